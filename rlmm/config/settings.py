"""`key=value` settings of a command, as a config section."""

from collections.abc import Sequence
from typing import TypeVar

import yaml
from pydantic import ValidationError

from rlmm.config.base import Strict, reason_of

SectionT = TypeVar("SectionT", bound=Strict)


def read_settings(kind: type[SectionT], settings: Sequence[str], example: str, **given: object) -> SectionT:
    """The section that `settings` make beside what is `given`. Raises ValueError for what does not fit; `example` shows
    how one is written."""
    values = dict(given)
    for setting in settings:
        key, found, value = setting.partition("=")
        if not found:
            raise ValueError(f"{setting!r} is no setting; write key=value, e.g. {example}")
        values[key] = yaml.safe_load(value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        told = [": ".join(filter(None, (".".join(map(str, e["loc"])), reason_of(e)))) for e in error.errors()]
        raise ValueError(f"the settings do not fit: {'; '.join(told)}") from error
