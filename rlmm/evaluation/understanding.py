"""What a policy understands: its answers to held-out questions, the same for every arm of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewards.base import Sample
from rewards.compose import Scored
from rlmm.codecs import Codec
from rlmm.config.engines import TorchEngineConfig
from rlmm.config.recipe import Understanding
from rlmm.config.sampling import Sampling
from rlmm.evaluation.statistics import bootstrap_mean
from rlmm.policies.responses import response_of, texts_of
from rlmm.policies.transformer import TransformerPolicy
from rlmm.rewarding import build_composite
from rlmm.seeds import derive
from rlmm.train import experience as phases
from rlmm.train.context import StageContext, image_tokens, load_rows
from rlmm.train.engines import build_engine

SHOWN = 6
"""Answers that are kept to be looked at."""


@dataclass(frozen=True)
class Answers:
    """Of one arm: a mean with its interval a metric, and the first questions with their answers."""

    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def understanding(context: StageContext, arm: str, policy: TransformerPolicy, codec: Codec, batch: int) -> Answers:
    """Ask an arm's policy; `batch` rows at once. Nothing where the recipe has no `understanding`."""
    asked = context.recipe.understanding
    if asked is None:
        return Answers([], [])
    samples = _answers(context, asked, policy, codec, batch)
    scored = build_composite(asked.rewards).checked(samples)
    values = _values(scored)
    rows = [{"arm": arm, "metric": name, **_interval(column)} for name, column in values.items()]
    shown = [
        {"arm": arm, "prompt": sample.prompt, "answer": sample.text, "reference": sample.target_texts[0]}
        | {"source": phases.png_bytes(sample.source_images[0]) if sample.source_images else None}
        | {f"score/{name}": column[i] for name, column in values.items()}
        for i, sample in enumerate(samples[:SHOWN])
    ]
    return Answers(rows, shown)


def _answers(
    context: StageContext, asked: Understanding, policy: TransformerPolicy, codec: Codec, batch: int
) -> list[Sample]:
    response = response_of(policy, Sampling(answer=asked.answer))
    data = load_rows(context, asked.data, "held_out", response.spelling)
    if len(data) < asked.prompts:
        raise ValueError(
            f"understanding has {len(data)} held-out rows and asks for {asked.prompts}; lower understanding.prompts"
        )
    examples, tokens = [data[i] for i in range(asked.prompts)], image_tokens(context, codec, policy)
    seed = derive(context.recipe.seed, "understanding")
    requests = [
        phases.request_for(response, tokens, example, f"understanding/{p:05d}", [derive(seed, p)])
        for p, example in enumerate(examples)
    ]
    made = phases.generate(build_engine(TorchEngineConfig(max_rows=batch), policy), response, requests, policy.model)
    return phases.samples_of(made, examples, [], texts_of(policy.tokenizer, made))


def _values(scored: Sequence[Scored]) -> dict[str, list[float]]:
    """Term -> values; NaN where a score is unavailable."""
    return {
        name: [np.nan if one.terms[name].value is None else float(one.terms[name].value or 0.0) for one in scored]
        for name in scored[0].terms
    }


def _interval(column: Sequence[float]) -> dict[str, Any]:
    found = bootstrap_mean(np.array(column)[:, None])
    return {
        "mean": found.mean, "low": found.low, "high": found.high, "n": found.prompts, "excluded": found.excluded,
    }  # fmt: skip


def understanding_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The figures as sentences."""
    return [
        f"{row['arm']} understands: {row['metric']} {row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}] "
        f"on {row['n']} held-out questions"
        for row in rows
    ]
