"""The base of every config model: frozen, typed, and closed to unknown keys."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


def nearest(name: str, known: list[str]) -> str:
    """A phrase naming the closest known names: ' Nearest: a, b.', or the whole list where nothing is close."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Nearest: {', '.join(close)}." if close else f" Known: {', '.join(sorted(known))}."


def reason_of(fault: Any) -> str:
    """One of a ValidationError's `errors()` as a phrase, with what was given where that is one value."""
    message = str(fault["msg"]).removeprefix("Value error, ")
    given = fault.get("input")
    shown = "" if isinstance(given, dict | list) or fault["type"] == "value_error" else f" (given: {given!r})"
    return message + shown


class Strict(BaseModel):
    """A frozen model in which an unknown key is an error that names the nearest known ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = list(cls.model_fields)
        for key in data:
            if key not in known:
                raise ValueError(f"unknown key {key!r}.{nearest(str(key), known)}")
        return data
