"""The pairs stage: samples of a policy are drawn and scored, or read of a GRPO stage, and made into preferences."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rewards.base import Sample
from rlmm.codecs import Codec
from rlmm.config.base import nearest
from rlmm.config.families import check_family
from rlmm.config.pairs import DRAWING, PairsStage, check_preferences
from rlmm.config.recipe import OWN_POLICY, recipe_of
from rlmm.config.rewards import Rewards
from rlmm.config.settings import read_settings
from rlmm.config.stages import GrpoStage
from rlmm.data import Example
from rlmm.policies.families.loading import load_spelling
from rlmm.policies.responses import writing_spelling
from rlmm.policies.spelling import Spelling
from rlmm.policies.transformer import TransformerPolicy
from rlmm.rewarding import build_composite
from rlmm.run_folder import RunFolder, differences
from rlmm.train import experience as phases
from rlmm.train.checkpoint import write_json_atomically
from rlmm.train.context import StageContext, image_tokens, load_split, parent, run_codec, sampled_policy
from rlmm.train.drawn import Drawn, Found, Paired, group_row, picture, read_drawn, with_rows
from rlmm.train.engines import within
from rlmm.train.judges import bind_judges, check_gold
from rlmm.train.pair_files import write_metrics, write_pairs, write_report
from rlmm.train.pair_samples import ANSWERS, PICTURES, OwnJudge, Scorer, draw, drawings, scored_by
from rlmm.train.pairing import UNANSWERED, choose_pairs
from rlmm.train.processes import wait, world


def run_pairs(context: StageContext) -> None:
    """Leaves pairs.parquet, margins.json and margins.png in the stage's folder, beside samples drawn anew.

    Raises ValueError where too many prompts are without a pair, or all.
    """
    config: PairsStage = context.config
    codec, folder = run_codec(context), context.folder
    codec.eval()
    folder.mkdir(parents=True, exist_ok=True)
    answers: Found | None = None
    if config.rollouts is not None:
        drawn, groups, origin = {}, _stored(context, config.rollouts), config.rollouts
    else:
        policy, origin = sampled_policy(context, codec), parent(context) or OWN_POLICY
        what = drawings(context, policy, codec, _scorer(context, policy, codec), folder)
        drawn = {name: draw(context, policy, codec, one) for name, one in what.items()}
        wait()
        penalty = _rewards(context).invalid_output_penalty
        groups = _groups(drawn[PICTURES], policy.spelling, penalty)
        if config.understanding is not None:
            penalty = config.understanding.rewards.invalid_output_penalty
            answers = pair_groups(_groups(drawn[ANSWERS], policy.spelling, penalty), config)
    if world()[0] == 0:
        found = pair_groups(groups, config)
        rows = [(pair, None) for pair in found.pairs] if answers is None else with_answers(found, answers)
        _judge(found, config, context)
        write_pairs(folder / "pairs.parquet", rows, codec, origin)
        write_report(folder, found, [one for _, one in rows if one is not None])
        write_metrics(folder, drawn.get(PICTURES, []), drawn.get(ANSWERS, []))


def _rewards(context: StageContext) -> Rewards:
    config: PairsStage = context.config
    return config.judge.rewards if config.judge is not None else config.rewards or context.recipe.rewards


def _scorer(context: StageContext, policy: TransformerPolicy, codec: Codec) -> Scorer:
    """What scores the pictures, once it is known to tell good from bad and to be what the stage started with."""
    config: PairsStage = context.config
    used = {"rewards": _rewards(context)}
    if config.understanding is not None:
        used["understanding"] = config.understanding.rewards
    check_gold(context, used)
    built = {name: build_composite(rewards) for name, rewards in used.items()}
    bind_judges(context, built)
    if config.judge is None:
        return scored_by(built["rewards"])
    return OwnJudge(policy, image_tokens(context, codec, policy), config.judge, context.seed("judge"))


def by_group(found: Found) -> dict[str, list[Paired]]:
    """The pairs of each group, in their order."""
    groups: dict[str, list[Paired]] = {}
    for pair in found.pairs:
        groups.setdefault(pair.chosen.group_id, []).append(pair)
    return groups


def with_answers(found: Found, answers: Found) -> list[tuple[Paired, Paired | None]]:
    """Each pair of pictures with one of answers about the same row's own picture; what finds none leaves `found`, and
    is counted."""
    waiting = by_group(answers)
    rows: list[tuple[Paired, Paired | None]] = []
    for pair in found.pairs:
        mine = waiting.get(pair.chosen.group_id)
        if mine:
            rows.append((pair, mine.pop(0)))
        else:
            found.leave_out(UNANSWERED, (pair.chosen, pair.rejected), (0, 1))
    found.left_out += Counter({f"answers: {reason}": count for reason, count in answers.left_out.items()})
    found.named += [f"answers: {name}" for name in answers.named]
    found.pairs = [pair for pair, _ in rows]
    found.without = found.prompts - len(by_group(found))
    return rows


def pairs_of_run(run_dir: Path, out: Path, settings: Sequence[str], say: Callable[[str], None]) -> None:
    """`run_pairs` of a run, outside of its recipe. Raises ValueError where there is no run, settings do not fit, or the
    folder has samples that were drawn otherwise."""
    recipe = recipe_of(run_dir)
    config = read_settings(PairsStage, settings, "rollouts=grpo")
    named = {"start_from": config.start_from, "rollouts": config.rollouts}
    for setting, stage in named.items():
        if stage not in (None, OWN_POLICY, *recipe.stages):
            raise ValueError(f"{setting}: {run_dir} has no stage {stage!r}.{nearest(str(stage), list(recipe.stages))}")
    check_preferences({**recipe.stages, "pairs": config})
    check_family("pairs", config, recipe.policy, None)
    run = RunFolder(run_dir, tuple(recipe.stages))
    if config.rollouts is None:
        _bind_drawing(
            out, {"run": str(run_dir.resolve())} | config.model_dump(mode="json", include={*DRAWING, "rewards"})
        )
    run_pairs(StageContext(recipe, run, "pairs of a run", config, say, out))


def _bind_drawing(out: Path, drawing: dict[str, Any]) -> None:
    """A folder's samples, which a second call goes on with, are all drawn and scored alike."""
    path = out / "drawing.json"
    changed = differences(json.loads(path.read_text()), drawing) if path.is_file() else []
    if changed:
        lines = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, old, new in changed)
        raise ValueError(
            f"{out} has samples that were drawn otherwise:\n{lines}\nGive another folder, or delete this one"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, drawing)


def pair_groups(groups: Iterator[list[Drawn]], config: PairsStage) -> Found:
    """The pairs of each group of samples."""
    found = Found()
    for group in groups:
        pairs, left_out = choose_pairs(
            [one.candidate for one in group],
            count=config.pairs_per_prompt,
            margin=config.margin,
            duplicate_distance=config.duplicate_distance,
        )
        found.pairs += [Paired(group[best], group[worst]) for best, worst in pairs]
        for one in left_out:
            found.leave_out(one.reason, group, one.candidates)
        found.prompts += 1
        found.samples += len(group)
        found.without += not pairs
    return found


def _groups(paths: Sequence[Path], spelling: Spelling, penalty: float) -> Iterator[list[Drawn]]:
    for path in paths:
        for _, rows in groupby(read_drawn(path, spelling.layout, penalty), lambda one: one.group_id):
            yield list(rows)


def _stored(context: StageContext, name: str) -> Iterator[list[Drawn]]:
    """The groups of a GRPO stage's rollouts, scored anew where this stage has rewards of its own."""
    stage = context.recipe.stages[name]
    assert isinstance(stage, GrpoStage), "the recipe was checked"
    inner, written = replace(context, name=name, config=stage, place=None), stage.sampling.written
    paths = sorted(inner.folder.glob("rollouts/*.parquet"))
    if not paths:
        raise ValueError(f"stage {name!r} has no rollouts in {inner.folder}; run it first, or leave `rollouts` out")
    spelling = _spelling(inner)
    if written is not None:
        spelling = writing_spelling(spelling, written, written.length_limit, stage.sampling.thought is not None)
    data, seed = load_split(inner, "prompts", within(stage.engine, spelling)), inner.seed("rollouts")
    rewards = context.config.rewards
    reward = None if rewards is None else build_composite(rewards)
    penalty = (rewards or context.recipe.rewards).invalid_output_penalty
    for path in paths:
        rows = list(
            with_rows(
                read_drawn(path, spelling.layout, penalty),
                data,
                lambda group: group_row(group, stage, len(data), seed),
            )
        )
        drawn = [one for one, _ in rows]
        if reward is not None:
            scored = reward.checked([_sample(one, example) for one, example in rows])
            values, valid = phases.totals(scored, penalty)
            drawn = [
                replace(one, candidate=replace(one.candidate, score=float(value) if there else None))
                for one, value, there in zip(drawn, values, valid, strict=True)
            ]
        for _, group in groupby(drawn, lambda one: one.group_id):
            yield list(group)


def _spelling(inner: StageContext) -> Spelling:
    """Of the policy that a GRPO stage trains: its own, or while it runs the one that it started from."""
    if inner.model_folder.is_dir():
        return load_spelling(inner.model_folder)
    start = parent(inner)
    if start is not None:
        return load_spelling(inner.run.stage(start) / "model")
    return sampled_policy(inner, run_codec(inner)).spelling


def _sample(one: Drawn, example: Example) -> Sample:
    return Sample(
        sample_id=one.sample_id,
        group_id=one.group_id,
        prompt=one.prompt,
        images=() if one.image is None else (picture(one.image),),
        text=one.text or "",
        source_images=example.sources,
        target_images=() if example.target is None else (example.target,),
        target_texts=example.texts,
        row=example.row,
    )


def _judge(found: Found, config: PairsStage, context: StageContext) -> None:
    why = ", ".join(f"{count} x {reason}" for reason, count in found.left_out.most_common())
    context.say(
        f"{context.name}: {len(found.pairs)} pairs of {found.prompts} prompts ({found.samples} samples); "
        f"{found.without} prompts without one" + (f"; left out: {why}" if why else "")
    )
    if not found.pairs or found.without > config.max_excluded_share * found.prompts:
        raise ValueError(
            f"{found.without} of {found.prompts} prompts have no pair ({why}); sample hotter, "
            "take more samples a prompt, lower margin or duplicate_distance, or look whether the reward tells samples "
            "apart"
        )
