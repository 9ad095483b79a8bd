"""What a recipe says about its rewards: the terms, how they combine, and what happens when one fails."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rewards import REWARDS, check_options
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


class SigmoidTransform(Strict):
    """Maps a raw score smoothly to (0, 1), 1/2 at `centre`. With a negative width, a lower raw score is the better
    one."""

    centre: float = Field(..., allow_inf_nan=False)
    width: float = Field(..., allow_inf_nan=False)
    """How far from the centre a score has moved from 0.5 to 0.73."""

    @model_validator(mode="after")
    def _some_width(self) -> "SigmoidTransform":
        if not self.width:
            raise ValueError("width 0 would make every score 0 or 1; give it about the spread of the scores")
        return self


class ServedTerm(Strict):
    """A reward in a process of its own, which the run starts and ends."""

    python: str = ""
    """The interpreter of the environment that has the reward's packages, and rlmm; this run's own by default."""
    environment: dict[str, str] = {}
    """More environment variables of the process, such as CUDA_VISIBLE_DEVICES."""
    concurrency: int = Field(1, ge=1)
    """Requests scored at once."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds for one request."""
    start_seconds: float = Field(300.0, gt=0)
    """Seconds until it must answer; loading a model takes some."""


class RewardTerm(Strict):
    """One reward: a built-in or an installed package's by `name`, or your own Python function."""

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
    transform: Literal["identity", "rank", "zscore"] | AffineTransform | SigmoidTransform = "identity"
    """What happens to the raw score before it is weighted. rank (0 to 1) and zscore are among the samples of its group
    that every term has a score for and no gate shuts out."""
    span: Literal["all", "text", "image"] = "all"
    """Whose tokens the term trains: all of a response, or its text (a thought) or its image alone. Under GRPO; what
    other stages compare is the total."""
    steps: bool = False
    """Train each token with the values of the steps that end after it, where the reward judges a response step by step
    (`Score.stepwise`); otherwise their mean counts for every token."""
    options: dict[str, Any] = {}
    """The reward's own settings."""
    serve: ServedTerm | None = None
    """Runs the reward in a process of its own, `serve: {}` in this environment."""

    @model_validator(mode="after")
    def _one_reward(self) -> "RewardTerm":
        if bool(self.name) == bool(self.function):
            raise ValueError("a reward term has either a name (a built-in) or a function (your own)")
        if self.name == "function":
            raise ValueError("for your own function, write `function: path/file.py:name` and no name")
        if self.serve is not None and self.name == "remote":
            raise ValueError("remote is a reward that is served already; `serve` is for the reward itself")
        # What another environment has installed is known there alone; its own error says what is wrong.
        if self.name and (self.serve is None or not self.serve.python or self.name in REWARDS):
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
    mode: Literal["weighted_sum", "product", "geometric_mean", "min"] = "weighted_sum"
    """In product and geometric_mean weights are exponents; the latter's add up to 1."""
    normalise: Literal["total", "terms"] = "total"
    """terms: each term is normalised in its group before they are summed (GDPO), and the sum is not after it."""
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
    on_failure: Literal["exclude", "fail"] = "exclude"
    """exclude: a sample without a score leaves its group, and training goes on; fail: the run stops."""
    failed_share: float | None = Field(None, ge=0, le=1)
    """The share of a rollout's samples that may be excluded; with more of them the run stops at once."""
    cache: int = Field(4096, ge=0)
    """Scores kept, in memory and in the checkpoints of a GRPO stage, so that equal samples are scored once; 0 for a
    reward that answers at random."""

    @property
    def ceiling(self) -> float:
        """The share of a rollout's samples that may be without a score."""
        return 0.0 if self.on_failure == "fail" else 1.0 if self.failed_share is None else self.failed_share

    @property
    def apart(self) -> list[RewardTerm]:
        """Terms that some tokens earn and others do not."""
        return [term for term in self.terms if term.weight and (term.span != "all" or term.steps)]

    @property
    def relative(self) -> str:
        """What makes totals comparable within a group alone, '' where nothing does."""
        if self.normalise == "terms":
            return "normalise: terms"
        return next((f"transform: {term.transform}" for term in self.terms if term.transform in ("rank", "zscore")), "")

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
        if self.mode in ("product", "geometric_mean") and any(term.weight < 0 for term in self.terms):
            raise ValueError(f"mode {self.mode} takes no negative weight; swap lo and hi of the term's transform")
        if self.normalise == "terms" and self.mode != "weighted_sum":
            raise ValueError(f"normalise: terms sums what it has normalised, and mode is {self.mode}; drop one of them")
        if any(term.transform == "zscore" for term in self.terms) and self.mode != "weighted_sum":
            raise ValueError(f"a zscore is negative for half of a group, which mode {self.mode} cannot take; use rank")
        if self.apart and self.mode != "weighted_sum":
            raise ValueError(f"a term with span or steps is a part of a sum, and mode is {self.mode}; drop one of them")
        for term in self.terms:
            if term.steps and (term.parts or term.transform in ("rank", "zscore") or self.normalise == "terms"):
                raise ValueError(
                    f"reward term {term.key!r}: steps have no parts, and no place among those of their group before "
                    "they are summed; leave parts, transform rank or zscore, and normalise: terms out"
                )
        if self.on_failure == "fail" and self.failed_share is not None:
            raise ValueError("on_failure: fail lets no sample fail, so failed_share would change nothing; drop one")
        if missing := [gate.term for gate in self.gate if gate.term not in keys]:
            raise ValueError(f"the gate names no reward term: {missing[0]!r}.{nearest(missing[0], keys)}")
        return self
