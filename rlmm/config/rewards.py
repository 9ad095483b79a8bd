"""What a recipe says about its rewards: the terms, how they combine, and what happens when one fails."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rewards import check_options
from rlmm.config.base import Strict, nearest


class AffineTransform(Strict):
    """Maps a raw score `lo` to 0 and `hi` to 1 and clips. With hi below lo, a lower raw score is the better
    one.
    """

    lo: float = Field(..., allow_inf_nan=False)
    hi: float = Field(..., allow_inf_nan=False)

    @model_validator(mode="after")
    def _two_ends(self) -> "AffineTransform":
        if self.lo == self.hi:
            raise ValueError(f"lo and hi are both {self.lo}: no score could be told from another; move one")
        return self


class RewardTerm(Strict):
    """One reward: a built-in by `name`, or your own Python function."""

    name: str = ""
    """A built-in reward; `rlmm reward list` shows them."""
    function: str = ""
    """path/file.py:name or module:name."""
    label: str = ""
    """What logs, report and gate call the term; by default the reward's or the function's name."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """0 scores and logs the term without counting it."""
    parts: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    """Weights of the score's parts, e.g. {value: 0.5, exact: 0.5}; by default its value alone."""
    transform: Literal["identity"] | AffineTransform = "identity"
    """What happens to the raw score before it is weighted."""
    options: dict[str, Any] = {}
    """The reward's own settings."""

    @model_validator(mode="after")
    def _one_reward(self) -> "RewardTerm":
        if bool(self.name) == bool(self.function):
            raise ValueError("a reward term has either a name (a built-in) or a function (your own)")
        if self.name == "function":
            raise ValueError("for your own function, write `function: path/file.py:name` and no name")
        if self.name:
            check_options(self.name, list(self.options))
        return self

    @property
    def key(self) -> str:
        """The term's name in logs."""
        return self.label or self.name or self.function.rpartition(":")[2]


class GateConfig(Strict):
    """Where the raw score of `term` is below `threshold`, the total is `floor`, whatever the other terms
    say.
    """

    term: str
    """A term's label or name."""
    threshold: float = Field(..., allow_inf_nan=False)
    floor: float = Field(0.0, allow_inf_nan=False)


class Rewards(Strict):
    """The rewards of a run and how they make one number."""

    terms: tuple[RewardTerm, ...] = Field(..., min_length=1)
    mode: Literal["weighted_sum", "product", "min"] = "weighted_sum"
    """product is the weighted geometric mean."""
    gate: tuple[GateConfig, ...] = ()
    """One gate, or a list of them: below any of them, the lowest of their floors is the total."""
    invalid_output_penalty: float = Field(0.0, allow_inf_nan=False)
    """The total of a sample that cannot be judged through the policy's own fault, as an undecodable image."""
    batch_size: int = Field(32, ge=1)
    """Samples a call of a reward."""
    deadline_s: float | None = Field(None, gt=0)
    """Seconds for one batch, retries included; after that its samples are unavailable. None waits for
    ever.
    """
    retries: int = Field(1, ge=0)
    """How often a reward that raised is called again with the same batch."""
    cache: int = Field(4096, ge=0)
    """Scores kept in memory, so that equal samples are scored once; 0 for a reward that answers at random."""

    @field_validator("gate", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return () if given is None else (given,) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _terms_fit_together(self) -> "Rewards":
        keys = [term.key for term in self.terms]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"two reward terms are called {twice[0]!r}; give one of them a label")
        if not any(term.weight for term in self.terms):
            raise ValueError("every reward term has weight 0, so nothing counts; give one a weight")
        if self.mode == "product" and any(term.weight < 0 for term in self.terms):
            raise ValueError("mode product takes no negative weight; swap lo and hi of the term's transform")
        if missing := [gate.term for gate in self.gate if gate.term not in keys]:
            raise ValueError(f"the gate names no reward term: {missing[0]!r}.{nearest(missing[0], keys)}")
        return self
