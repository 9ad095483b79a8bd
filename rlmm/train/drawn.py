"""Scored samples in rollout files: drawn anew for pairs, or read of a GRPO stage's."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rewards.compose import CompositeReward
from rlmm.codecs import Codec
from rlmm.config.preference import PairsStage
from rlmm.config.stages import GrpoStage
from rlmm.data import Dataset, Example
from rlmm.policies.layout_io import read_codes
from rlmm.policies.responses import response_of, texts_of
from rlmm.policies.transformer import TransformerPolicy
from rlmm.seeds import derive, epoch_indices
from rlmm.train import experience as phases
from rlmm.train.context import StageContext, image_tokens, load_split
from rlmm.train.drawing import decode_images
from rlmm.train.engines import build_engine
from rlmm.train.experience import Timed
from rlmm.train.pairing import Candidate
from rlmm.train.processes import world
from rollouts.contract import Layout
from rollouts.store import read_trajectory, write_trajectory
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class Drawn:
    """A scored sample and where it comes from. `image` and `sources` as PNG; `law` as JSON."""

    sample_id: str
    group_id: str
    prompt: str
    image: bytes | None
    codes: tuple[int, ...] | None
    text: str
    candidate: Candidate
    sources: tuple[bytes, ...]
    weights_version: int
    law: str
    file: str


@dataclass(frozen=True)
class Paired:
    """A pair and the samples that made it."""

    chosen: Drawn
    rejected: Drawn

    @property
    def margin(self) -> float:
        assert self.chosen.candidate.score is not None and self.rejected.candidate.score is not None
        return self.chosen.candidate.score - self.rejected.candidate.score


@dataclass
class Found:
    """Pairs of all prompts, and what was left out, by reason."""

    pairs: list[Paired] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    prompts: int = 0
    samples: int = 0
    without: int = 0
    """Prompts of which no pair came."""


def draw_batches(
    context: StageContext, policy: TransformerPolicy, codec: Codec, reward: CompositeReward, folder: Path
) -> list[Path]:
    """Sample and score the stage's prompts, a file a batch; what is there already is passed over. Processes take turns,
    and a batch is the same whichever makes it. Returns every batch's file."""
    config: PairsStage = context.config
    response, tokens = response_of(policy, config.sampling), image_tokens(context, codec)
    data, seed = load_split(context, "prompts", response.spelling), context.seed("rollouts")
    rows = epoch_indices(len(data), 0, config.prompts, seed, "prompts")
    starts = range(0, config.prompts, config.batch_prompts)
    paths = [folder / "rollouts" / f"step-{number:06d}.parquet" for number in range(len(starts))]
    rank, processes = world()
    missing = [number for number in range(rank, len(starts), processes) if not paths[number].is_file()]
    engine = build_engine(config.engine, policy, response.law) if missing else None
    for number in missing:
        assert engine is not None, "there is one where something is missing"
        timed, places = Timed(), range(starts[number], min(starts[number] + config.batch_prompts, config.prompts))
        examples = [data[rows[place]] for place in places]
        with timed("rollout"):
            seeds = [[derive(seed, "sample", p, s) for s in range(config.samples_per_prompt)] for p in places]
            requests = [
                phases.request_for(response, tokens, example, f"{context.name}/{place:06d}", its)
                for place, example, its in zip(places, examples, seeds, strict=True)
            ]
            made = phases.generate(engine, response, requests, policy.model)
        each = [example for example in examples for _ in range(config.samples_per_prompt)]
        with timed("score"):
            images = decode_images(codec, policy, made)
            samples = phases.samples_of(made, each, images, texts_of(policy.tokenizer, made))
            columns = phases.scored_columns(number, samples, reward.checked(samples))
        columns["source_images"] = [[phases.png_bytes(image) for image in example.sources] for example in each]
        columns |= {name: [seconds] * len(each) for name, seconds in timed.figures().items()}
        write_trajectory(paths[number], made, columns)
        context.say(f"{context.name}: {places.stop} of {config.prompts} prompts sampled and scored")
    if engine is not None:
        engine.close()
    return paths


def read_drawn(path: Path, layout: Layout, penalty: float) -> list[Drawn]:
    """The samples of a rollout file; an invalid output has the score `penalty`."""
    made, columns = read_trajectory(path)
    codes = read_codes(layout, made.ids[:, -layout.grid.length :]).tolist() if made.spans[-1].kind == "image" else None
    law, ended = json.dumps([span.to_dict() for span in made.spans]), _ended(made)
    sources = columns.get("source_images") or [[]] * len(made)
    return [
        Drawn(
            sample_id=made.sample_id[row],
            group_id=made.group_id[row],
            prompt=columns["prompt"][row],
            image=columns["image"][row],
            codes=None if codes is None else tuple(codes[row]),
            text=columns["text"][row],
            candidate=Candidate(
                _score(columns["reward_status"][row], columns["reward"][row], penalty),
                made.ids[row, made.target_mask[row]].tolist(),
                ended[row],
            ),
            sources=tuple(sources[row]),
            weights_version=made.weights_version,
            law=law,
            file=path.name,
        )
        for row in range(len(made))
    ]


def _score(status: str, value: float | None, penalty: float) -> float | None:
    if status == "invalid_output":
        return penalty
    return value if value is not None and math.isfinite(value) else None


def _ended(made: Trajectory) -> list[bool]:
    """Whether each row's text, where it has one, came to its end."""
    ended_B = np.ones(len(made), dtype=bool)
    for index, span in enumerate(made.spans):
        if span.kind == "text":
            stops_BS = torch.isin(made.ids, torch.tensor(span.stop, dtype=torch.long)) & (made.span == index)
            ended_B &= (stops_BS & made.target_mask).any(1).numpy()
    return ended_B.tolist()


def group_row(group: str, config: GrpoStage, size: int, seed: int) -> int:
    """The data row that a group of a GRPO stage was sampled for: the rollout's prompts, and the replacements of flat
    groups, are functions of their numbers (`rlmm.train.rounds`)."""
    rollout, _, place = group.partition("/")
    at, _, extra = place.partition("+")
    count = config.prompts_per_step
    if not extra:
        return epoch_indices(size, int(rollout) * count, count, seed, "prompts")[int(at)]
    first = (int(rollout) * config.resample_flat + int(extra) - 1) * count
    return epoch_indices(size, first, count, seed, "replacements")[int(at)]


def with_rows(drawn: Sequence[Drawn], data: Dataset, row_of: Callable[[str], int]) -> Iterator[tuple[Drawn, Example]]:
    """Each sample with the row that it was drawn for, whose source images it takes. ValueError where that row has
    another prompt: the data are no longer what they were."""
    rows: dict[str, Example] = {}
    for one in drawn:
        if one.group_id not in rows:
            rows[one.group_id] = data[row_of(one.group_id)]
        example = rows[one.group_id]
        if example.prompt != one.prompt:
            raise ValueError(
                f"{one.file}: sample {one.sample_id} has the prompt {one.prompt!r:.80}, its row "
                f"{example.prompt!r:.80}; the data have changed since: use samples drawn anew (leave `rollouts` out)"
            )
        yield replace(one, sources=tuple(phases.png_bytes(image) for image in example.sources)), example


def picture(png: bytes) -> Image.Image:
    return Image.open(BytesIO(png))
