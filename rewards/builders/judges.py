"""Rewards that ask a served multimodal model. Each takes the options of `connect` beside its own."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rewards.base import Reward

if TYPE_CHECKING:
    from rewards.verifier.client import Client

Connect = Callable[[], "Client"]


def connect(
    *,
    url: str,
    model: str,
    check: bool = True,
    api_key_env: str = "",
    timeout_s: float = 60.0,
    retries: int = 3,
    backoff_s: float = 0.5,
    concurrency: int = 16,
    failures: int = 20,
    cooldown_s: float = 15.0,
    extra_body: Mapping[str, Any] | None = None,
) -> "Client":
    """A client of a judge's server, asked first, where `check` is on, whether it serves the model."""
    from rewards.verifier.client import Client
    from rewards.verifier.server import Server

    client = Client(
        Server(
            url, model, api_key_env, timeout_s, retries, backoff_s, concurrency, extra_body or {}, failures, cooldown_s
        )
    )
    if check:
        client.check()
    return client


def _served(make: Callable[..., Reward]) -> Callable[..., Reward]:
    """`make(connect, **options)` as an entry of the registry: its options and those of the server, by keyword. `make`
    reads its own options first, so that one that will not do is told before any server is asked.
    """
    server = inspect.signature(connect).parameters
    own = [item for item in inspect.signature(make).parameters.values() if item.kind is item.KEYWORD_ONLY]

    @functools.wraps(make)
    def build(**options: Any) -> Reward:
        reach = {key: value for key, value in options.items() if key in server}
        rest = {key: value for key, value in options.items() if key not in server}
        return make(functools.partial(connect, **reach), **rest)

    # What `inspect.signature` is asked for, and answers, where options are checked.
    build.__signature__ = inspect.Signature([*server.values(), *own])  # type: ignore[attr-defined]
    return build


@_served
def yes_no(
    server: Connect,
    *,
    questions: Sequence[Mapping[str, Any]] | None = None,
    combine: Literal["geometric", "mean"] = "geometric",
    min_mass: float = 0.5,
    top_logprobs: int = 20,
) -> Reward:
    """A served multimodal model's probability of yes to questions about the image."""
    from rewards.verifier.yes_no import YesNoReward, read_questions

    asked = read_questions(questions)
    return YesNoReward(server(), questions=asked, combine=combine, min_mass=min_mass, top_logprobs=top_logprobs)


@_served
def checklist(
    server: Connect,
    *,
    column: str = "questions",
    aggregate: Literal["mean", "weighted", "all"] = "mean",
    min_mass: float = 0.5,
    top_logprobs: int = 20,
) -> Reward:
    """A served multimodal model's yes or no to each of the data row's own questions."""
    from rewards.verifier.checklist import ChecklistReward

    return ChecklistReward(server(), column=column, aggregate=aggregate, min_mass=min_mass, top_logprobs=top_logprobs)


@_served
def expected_score(
    server: Connect,
    *,
    criteria: Sequence[Mapping[str, Any]] | None = None,
    lowest: int = 0,
    highest: int = 9,
    combine: Literal["geometric", "mean"] = "geometric",
    min_mass: float = 0.5,
    top_logprobs: int = 20,
) -> Reward:
    """A served multimodal model's expected digit for each criterion."""
    from rewards.verifier.criteria import read_criteria
    from rewards.verifier.expected_score import ExpectedScoreReward

    return ExpectedScoreReward(
        criteria=read_criteria(criteria),
        lowest=lowest,
        highest=highest,
        combine=combine,
        min_mass=min_mass,
        top_logprobs=top_logprobs,
        client=server(),
    )


@_served
def rubric(
    server: Connect,
    *,
    criteria: Sequence[Mapping[str, Any]] | None = None,
    combine: Literal["geometric", "mean"] = "geometric",
    max_tokens: int = 512,
    reasks: int = 2,
) -> Reward:
    """A served multimodal model's marks for criteria of your own, reasons first."""
    from rewards.verifier.criteria import read_criteria
    from rewards.verifier.rubric import RubricReward

    asked = read_criteria(criteria)
    return RubricReward(server(), criteria=asked, combine=combine, max_tokens=max_tokens, reasks=reasks)


@_served
def target_match(
    server: Connect,
    *,
    combine: Literal["geometric", "mean"] = "geometric",
    max_tokens: int = 512,
    reasks: int = 2,
) -> Reward:
    """A served multimodal model's marks for how near the image comes to the row's target image."""
    from rewards.verifier.criteria import TARGET
    from rewards.verifier.rubric import RubricReward

    return RubricReward(
        server(), criteria=TARGET, combine=combine, max_tokens=max_tokens, reasks=reasks, name="target_match"
    )


@_served
def viescore(server: Connect, *, max_tokens: int = 512) -> Reward:
    """A served multimodal model's VIEScore: what was asked for, and how it looks."""
    from rewards.verifier.viescore import VieScoreReward

    return VieScoreReward(server(), max_tokens=max_tokens)


@_served
def pairwise(
    server: Connect,
    *,
    better: str = "overall",
    opponents: int = 0,
    disagreement: Literal["tie", "unavailable"] = "tie",
    min_share: float = 0.5,
    min_mass: float = 0.5,
    top_logprobs: int = 20,
) -> Reward:
    """A served multimodal model's win rate of each sample over its group, pairs in both orders."""
    from rewards.verifier.pairwise import PairwiseReward

    return PairwiseReward(
        server(),
        better=better,
        opponents=opponents,
        disagreement=disagreement,
        min_share=min_share,
        min_mass=min_mass,
        top_logprobs=top_logprobs,
    )


@_served
def ranking(
    server: Connect,
    *,
    better: str = "overall",
    min_agreement: float = 0.5,
    max_tokens: int = 512,
    reasks: int = 2,
) -> Reward:
    """A served multimodal model's ranking of each group at once, in two orders."""
    from rewards.verifier.ranking import RankingReward

    return RankingReward(server(), better=better, min_agreement=min_agreement, max_tokens=max_tokens, reasks=reasks)
