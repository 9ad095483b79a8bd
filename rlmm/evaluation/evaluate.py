"""Held-out evaluation: every arm at several temperatures and sampling seeds, by judges with intervals.

An arm is a finished policy stage. All arms see the same prompts and the same sampling seeds, so differences are
paired. Shapes: P prompts, S sampling seeds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rewards.base import Sample, Score
from rewards.compose import CompositeReward
from rlmm.codecs import Codec
from rlmm.config.engines import TorchEngineConfig
from rlmm.config.stages import EvalStage, PolicyStage, best_of_name
from rlmm.data import Example
from rlmm.evaluation.best_of import CurvePoint, best, curve, scores_of
from rlmm.evaluation.compute import compute, compute_lines
from rlmm.evaluation.reference import write_reference
from rlmm.evaluation.statistics import bootstrap_mean, diversity, paired_difference
from rlmm.evaluation.understanding import Answers, understanding, understanding_lines
from rlmm.policies.families.loading import load_spelling
from rlmm.policies.responses import response_of, texts_of, writing_spelling
from rlmm.policies.spelling import Spelling
from rlmm.policies.transformer import TransformerPolicy
from rlmm.rewarding import build_composite
from rlmm.seeds import derive
from rlmm.train import experience as phases
from rlmm.train.checkpoint import write_json_atomically
from rlmm.train.context import StageContext, image_tokens, load_split, placed, run_codec, stage_policy
from rlmm.train.drawing import decode_images
from rlmm.train.engines import build_engine
from rollouts.trajectory import Trajectory

BEST = "best"
HEADLINE = ("exact", "strict", "value")


@dataclass(frozen=True)
class Cell:
    """One arm at one temperature: judge -> metric -> values [P, S] (NaN where unavailable), and its samples."""

    arm: str
    temperature: float
    values: dict[str, dict[str, np.ndarray]]
    diversity: float
    rows: list[dict[str, Any]]
    curve: Sequence[CurvePoint] = ()
    """Of a best-of-n arm: the expected best score by the trained reward, against n."""


def run_eval(context: StageContext) -> None:
    """Score every arm; leaves eval.json, samples.parquet and reference.parquet in the stage's folder, and prints the
    contrasts.
    """
    config: EvalStage = context.config
    spellings = [_spelling(context, config, arm) for arm in config.arms]
    data = load_split(context, "held_out", *spellings)
    if len(data) < config.skip + config.prompts:
        raise ValueError(
            f"the held-out split has {len(data)} prompts and the stage asks for {config.prompts} after {config.skip}"
        )
    judges = {"held_out": build_composite(context.recipe.held_out), "trained": build_composite(context.recipe.rewards)}
    answers: list[Answers] = []
    examples = [data[config.skip + i] for i in range(config.prompts)]
    cells = list(_cells(context, config, examples, judges, answers))
    found = contrasts(cells, config, set(_terms(judges["held_out"])))
    costs = [compute(context, arm) for arm in config.arms]
    notes = compute_lines(costs)
    for arm, n in config.best_of.items():
        costs.append({**next(row for row in costs if row["arm"] == arm), "arm": best_of_name(arm, n), "drawn": n})
        notes.append(f"{best_of_name(arm, n)}: trained as {arm}, and draws {n} samples for one")
    record = {
        "rows": [row for cell in cells for row in _rows(cell, config)],
        "contrasts": found,
        # One sample a prompt has nothing to differ from.
        "diversity": [
            {"arm": c.arm, "temperature": c.temperature, "value": c.diversity}
            for c in cells
            if np.isfinite(c.diversity)
        ],
        "best_of": [
            {"arm": c.arm, "of": arm, "n": n, "temperature": c.temperature, "curve": [asdict(p) for p in c.curve]}
            for arm, n in config.best_of.items()
            for c in cells
            if c.arm == best_of_name(arm, n)
        ],
        "understanding": [row for one in answers for row in one.rows],
        "compute": costs,
        "compute_notes": notes,
    }
    context.folder.mkdir(parents=True, exist_ok=True)
    partial = context.folder / "samples.partial"
    pq.write_table(pa.Table.from_pylist([row for cell in cells for row in cell.rows]), partial)
    partial.replace(context.folder / "samples.parquet")
    if shown := [row for one in answers for row in one.samples]:
        pq.write_table(pa.Table.from_pylist(shown), partial)
        partial.replace(context.folder / "answers.parquet")
    write_reference(context, run_codec(context))
    write_json_atomically(context.folder / "eval.json", record)
    for line in [*notes, *contrast_lines(found), *understanding_lines(record["understanding"])]:
        context.say(line)


def _spelling(context: StageContext, config: EvalStage, arm: str) -> Spelling:
    """How an arm's policy spells the held-out prompts."""
    spelling, written = load_spelling(context.run.stage(arm) / "model"), config.written
    if written is None:
        return spelling
    return writing_spelling(spelling, written, written.length_limit, config.thought is not None)


def _cells(
    context: StageContext,
    config: EvalStage,
    examples: list[Example],
    judges: dict[str, CompositeReward],
    answers: list[Answers],
) -> Iterator[Cell]:
    """Every arm at every temperature; what an arm understands is added to `answers`, while its policy is there."""
    codec = run_codec(context)
    codec.eval()
    for arm in config.arms:
        stage = context.recipe.stages[arm]
        assert isinstance(stage, PolicyStage), "the recipe lets nothing else be an arm"
        policy = placed(context, stage_policy(context, arm), stage.precision)
        policy.model.eval()
        answers.append(understanding(context, arm, policy, codec, config.batch_prompts))
        for temperature in config.temperatures:
            context.say(f"evaluating {arm} at temperature {temperature:g} on {config.prompts} held-out prompts")
            yield _cell(context, config, (arm, temperature), policy, codec, examples, judges)
        for temperature in config.temperatures if arm in config.best_of else ():
            yield _cell(context, config, (arm, temperature), policy, codec, examples, judges, config.best_of[arm])


def _cell(
    context: StageContext,
    config: EvalStage,
    name: tuple[str, float],
    policy: TransformerPolicy,
    codec: Codec,
    examples: list[Example],
    judges: dict[str, CompositeReward],
    best_of: int = 1,
) -> Cell:
    count = config.sampling_seeds * best_of
    made, samples = sample_held_out(context, config, policy, codec, name[1], examples, count)
    points: list[CurvePoint] = []
    if best_of > 1:
        name = best_of_name(name[0], best_of), name[1]
        totals = scores_of(judges["trained"].checked(samples), context.recipe.rewards.invalid_output_penalty)
        if unscored := int(np.isnan(totals.reshape(-1, best_of)).all(1).sum()):
            context.say(f"{name[0]}: {unscored} choices among samples without a score, of which the first was taken")
        chosen = [run * best_of + best(part) for run, part in enumerate(totals.reshape(-1, best_of))]
        made, samples, points = made.rows(chosen), [samples[row] for row in chosen], curve(totals.reshape(-1, count))
    scores: dict[str, list[Score]] = {}
    for judge in judges.values():
        for one in judge.checked(samples):
            for term, score in one.terms.items():
                scores.setdefault(term, []).append(score)
    shape = (len(examples), config.sampling_seeds)
    values = {
        term: {m: np.array(v).reshape(shape) for m, v in _metrics(column).items()} for term, column in scores.items()
    }
    rows = [
        {"arm": name[0], "temperature": name[1], "seed": i % config.sampling_seeds, "prompt": sample.prompt}
        | {"image": phases.png_bytes(sample.images[0]) if sample.images else None, "text": sample.text}
        | {"source": phases.png_bytes(sample.source_images[0]) if sample.source_images else None}
        | {f"score/{term}": column[i].value for term, column in scores.items()}
        | {f"reading/{term}": column[i].reason for term, column in scores.items()}
        for i, sample in enumerate(samples)
    ]
    spread = diversity(made.ids.numpy(), made.target_mask.numpy(), list(made.group_id))
    return Cell(*name, values, spread, rows, points)


def sample_held_out(
    context: StageContext,
    config: EvalStage,
    policy: TransformerPolicy,
    codec: Codec,
    temperature: float,
    examples: Sequence[Example],
    count: int,
) -> tuple[Trajectory, list[Sample]]:
    """`count` samples of every held-out prompt, prompt-major; a sample's seed depends on its prompt's place and its own
    number alone."""
    engine = build_engine(TorchEngineConfig(max_rows=config.batch_prompts * config.sampling_seeds), policy)
    response, tokens = response_of(policy, config.sampling(temperature)), image_tokens(context, codec, policy)
    seed = derive(context.recipe.seed, "evaluation")
    requests = [
        phases.request_for(response, tokens, example, f"eval/{p:05d}", _seeds(seed, p, count))
        for p, example in enumerate(examples)
    ]
    made = phases.generate(engine, response, requests, policy.model)
    images = decode_images(codec, policy, made)
    rows = [example for example in examples for _ in range(count)]
    return made, phases.samples_of(made, rows, images, texts_of(policy.tokenizer, made))


def _seeds(seed: int, place: int, count: int) -> list[int]:
    return [derive(seed, place, s) for s in range(count)]


def _metrics(column: Sequence[Score]) -> dict[str, list[float]]:
    """`value` and every part, NaN where a sample's score is unavailable; invalid output counts as 0."""
    parts = sorted({part for score in column for part in score.parts})
    missing = [0.0 if score.status == "invalid_output" else np.nan for score in column]
    table = {"value": [m if s.value is None else s.value for s, m in zip(column, missing, strict=True)]}
    for part in parts:
        table[part] = [s.parts.get(part, m) for s, m in zip(column, missing, strict=True)]
    return table


def _rows(cell: Cell, config: EvalStage) -> Iterator[dict[str, Any]]:
    for judge, metrics in cell.values.items():
        for metric, values in metrics.items():
            interval = bootstrap_mean(values)
            yield {
                "arm": cell.arm, "temperature": cell.temperature, "judge": judge, "metric": metric,
                "mean": interval.mean, "low": interval.low, "high": interval.high,
                "n_prompts": interval.prompts, "n_seeds": config.sampling_seeds, "excluded": interval.excluded,
            }  # fmt: skip


def contrasts(cells: Sequence[Cell], config: EvalStage, held_out: set[str]) -> list[dict[str, Any]]:
    """Every later arm against every earlier one by the held-out judge: at each temperature, and best against best.
    The last arm comes first, and what only chooses among samples after what was trained; of the metrics those that say
    whether a sample is wholly right.

    "Best" is each arm's temperature with the highest mean of the metric among those tried, so that a policy which
    merely became sharper gains little over one sampled colder; `at_edge` marks a best that is the coldest or hottest
    tried, where a still better one may lie outside. It is chosen on the prompts it is reported on.
    """
    arms = config.every_arm
    pairs = [(arm, baseline) for i, arm in reversed(list(enumerate(arms))) for baseline in arms[:i]]
    pairs.sort(key=lambda pair: pair[0] not in config.arms)
    judged = [(judge, metric) for judge, values in cells[0].values.items() if judge in held_out for metric in values]
    judged.sort(key=lambda name: HEADLINE.index(name[1]) if name[1] in HEADLINE else len(HEADLINE))
    return [row for name in judged for arm, baseline in pairs for row in _contrast(cells, arm, baseline, *name)]


def _contrast(cells: Sequence[Cell], arm: str, baseline: str, judge: str, metric: str) -> Iterator[dict[str, Any]]:
    mine, theirs = ({c.temperature: c for c in cells if c.arm == name} for name in (arm, baseline))

    def best(table: dict[float, Cell]) -> float:
        return max(table, key=lambda t: float(np.nanmean(table[t].values[judge][metric])))

    compared = [(t, t, str(t)) for t in mine] + [(best(mine), best(theirs), BEST)]
    for t_arm, t_baseline, at in compared:
        values = mine[t_arm].values[judge][metric], theirs[t_baseline].values[judge][metric]
        difference = paired_difference(*values)
        yield {
            "arm": arm,
            "baseline": baseline,
            "judge": judge,
            "metric": metric,
            "at": at,
            "difference": difference.mean,
            "low": difference.low,
            "high": difference.high,
            "arm_temperature": t_arm,
            "baseline_temperature": t_baseline,
            "at_edge": at == BEST and bool({t_arm, t_baseline} & {min(mine), max(mine)}) and len(mine) > 1,
        }


def _terms(reward: CompositeReward) -> list[str]:
    return [term.name for term in reward.terms]


def contrast_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The differences at each arm's best temperature, as sentences."""
    return [
        f"{row['arm']} minus {row['baseline']}, {row['judge']} {row['metric']} on held-out prompts: "
        f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] "
        f"(best temperatures {row['arm_temperature']:g} and {row['baseline_temperature']:g})"
        for row in rows
        if row["at"] == BEST and row["metric"] in HEADLINE
    ]
