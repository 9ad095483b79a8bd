"""Which objective may consume which estimate of a log-prob.

A likelihood ratio needs a likelihood. A bound or a one-pass approximation of one can drive some objectives
and ruin others; what is refused here is refused when the config is read.
"""

from enum import StrEnum
from typing import get_args

from rlmm.config.base import nearest
from rlmm.objectives.records import Family


class LogProbKind(StrEnum):
    """What a log-prob is."""

    EXACT = "exact"
    """log pi(x) itself: next-token, next-scale."""
    TRAJECTORY = "trajectory"
    """log pi(x, decisions) along the sampled chain, the order's own log-prob included where it depends on the
    policy."""
    ELBO = "elbo"
    """A noisy lower bound of log pi(x)."""
    MEAN_FIELD = "mean_field"
    """Every token from one fully masked pass, as if independent."""
    SURROGATE = "surrogate"
    """Something cheaper with a useful gradient, such as guidance with a detached unconditional branch."""


class IllegalObjective(ValueError):
    """The objective cannot consume this kind of log-prob."""


_HEURISTIC = "it is no likelihood, so the ratio is a heuristic: watch the effective sample size"

_NO_MARGIN = "DPO compares likelihoods or their bounds, and nothing says how far off this is"

# family -> kind -> None where sound, else why not. A heuristic runs with its reason as a warning; others need
# force.
LEGALITY: dict[Family, dict[LogProbKind, str | None]] = {
    "token_ratio": {
        LogProbKind.EXACT: None,
        LogProbKind.TRAJECTORY: None,
        LogProbKind.ELBO: "a bound has no value a token: exp of its difference at one mask is the ratio of "
        "nothing; use level: sequence",
        LogProbKind.MEAN_FIELD: _HEURISTIC,
        LogProbKind.SURROGATE: _HEURISTIC,
    },
    "sequence_ratio": {
        LogProbKind.EXACT: None,
        LogProbKind.TRAJECTORY: None,
        LogProbKind.ELBO: None,  # with the same noise for the old and the current policy
        LogProbKind.MEAN_FIELD: _HEURISTIC,
        LogProbKind.SURROGATE: _HEURISTIC,
    },
    "ratio_free": dict.fromkeys(LogProbKind),
    "dpo": {
        LogProbKind.EXACT: None,
        LogProbKind.TRAJECTORY: "the chosen and rejected images of a pair carry no trajectory of this "
        "policy; use an ELBO or an exact likelihood",
        LogProbKind.ELBO: None,
        LogProbKind.MEAN_FIELD: _NO_MARGIN,
        LogProbKind.SURROGATE: _NO_MARGIN,
    },
    "token_kl": {
        LogProbKind.EXACT: None,
        LogProbKind.TRAJECTORY: None,
        LogProbKind.ELBO: "noise in the difference of two bounds biases k2 by half its variance and k3 by "
        "its exponential; use kl.kind k2 and an estimator with draws that are independent (count or bernoulli, two or "
        "more), which takes the bias out, or set kl.coefficient to 0",
        LogProbKind.MEAN_FIELD: _HEURISTIC,
        LogProbKind.SURROGATE: _HEURISTIC,
    },
    "bound_kl": dict.fromkeys(LogProbKind, "this KL is of bounds known by independent draws; use the token's own")
    | {LogProbKind.ELBO: None},
}


def check_legal(objective: str, kind: LogProbKind, *, force: bool = False) -> str | None:
    """None where the pair is sound, a warning where it is a heuristic or forced; IllegalObjective otherwise.

    `objective`: a family of `LEGALITY` (`Objective.family`, "dpo", "token_kl").
    """
    rows: dict[str, dict[LogProbKind, str | None]] = {family: LEGALITY[family] for family in get_args(Family)}
    if objective not in rows:
        raise ValueError(f"unknown objective family {objective!r}.{nearest(objective, list(rows))}")
    reason = rows[objective][kind]
    if reason is None:
        return None
    message = f"{objective} on a log-prob of kind {kind.value}: {reason}"
    if reason == _HEURISTIC or force:
        return message
    sound = ", ".join(k.value for k, why in rows[objective].items() if why is None)
    raise IllegalObjective(
        f"{message}. Sound kinds: {sound}. To run it as a baseline all the same, set estimator.force: true, where the "
        "stage has an estimator."
    )
