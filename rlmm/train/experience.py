"""One rollout: prompts -> trajectory -> images -> scores -> advantages, as an `Experience` the update reads.

Every phase is a function of the step and the weights, so a rollout that is made again after a kill is the same one.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.base import Sample, Score
from rewards.compose import Scored
from rlmm.config.stages import GrpoStage
from rlmm.data import Dataset, Example
from rlmm.evaluation.statistics import diversity, duplicate_share
from rlmm.objectives.advantages import AdvantageResult
from rlmm.policies.layout_io import spell_image
from rlmm.policies.responses import Response
from rlmm.policies.spelling import Spelling
from rlmm.seeds import derive, epoch_indices
from rlmm.train.faults import storing
from rlmm.train.heart import phase
from rlmm.train.processes import gather, gather_arrays, share, world
from rlmm.train.tokens import ImageTokens, image_hash
from rollouts.contract import Engine, Request
from rollouts.interleaved import generate_spans
from rollouts.store import read_trajectory, write_trajectory
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class Experience:
    """A scored rollout of this process. `advantage` float32 [B], or [B, S] where tokens earn apart; `kept_B` bool;
    log-probs [B, S], and those of each noise draw [B, n], or None if unused."""

    trajectory: Trajectory
    advantage: Tensor
    kept_B: Tensor
    old_logp_BS: Tensor | None = None
    reference_logp_BS: Tensor | None = None
    reference_draws_Bn: Tensor | None = None


def spell_sources(tokens: ImageTokens, spelling: Spelling, images: Sequence[Image.Image]) -> list[list[int]]:
    """Ids of source images: their codes, or what refers to them where the policy sees them through an encoder."""
    if not images:
        return []
    if spelling.sees and tokens.pictures is not None:
        return tokens.pictures.spell(images)
    return [spell_image(spelling.layout, row) for row in tokens.codes(images).tolist()]


def request_for(response: Response, tokens: ImageTokens, example: Example, group: str, seeds: Sequence[int]) -> Request:
    """A prompt's request: the streams its laws read, and one id a seed."""
    return Request(
        group_id=group,
        streams=response.streams(example.prompt, spell_sources(tokens, response.spelling, example.sources)),
        seeds=tuple(seeds),
        sample_ids=tuple(f"{group}/{i}" for i in range(len(seeds))),
        sources=tuple(image_hash(image) for image in example.sources),
    )


def step_prompts(data: Dataset, config: GrpoStage, rollout: int, seed: int) -> list[tuple[int, Example]]:
    """This process's (place in the step, row) pairs: the global order does not depend on the number of processes."""
    count = config.prompts_per_step
    rows = epoch_indices(len(data), rollout * count, count, seed, "prompts")
    places = range(count)[share(count, "prompts_per_step")]
    return [(place, data[rows[place]]) for place in places]


def rollout_requests(
    response: Response,
    tokens: ImageTokens,
    prompts: Sequence[tuple[int, Example]],
    config: GrpoStage,
    rollout: int,
    seed: int,
    extra: int = 0,
) -> list[Request]:
    """Seeds hash (run, stage, rollout, prompt's place, sample): independent of rank and of batch position. `extra`
    numbers the rounds in which flat groups are replaced."""
    again = () if not extra else (extra,)
    return [
        request_for(
            response,
            tokens,
            example,
            f"{rollout:06d}/{place:04d}" + (f"+{extra}" if extra else ""),
            [derive(seed, "sample", rollout, place, sample, *again) for sample in range(config.samples_per_prompt)],
        )
        for place, example in prompts
    ]


def samples_of(
    trajectory: Trajectory, examples: Sequence[Example], images: Sequence[Image.Image], texts: Sequence[str]
) -> list[Sample]:
    """One Sample a row; `examples` and `texts` have one entry a row, and so has `images` where images were drawn."""
    return [
        Sample(
            sample_id=trajectory.sample_id[row],
            group_id=trajectory.group_id[row],
            prompt=example.prompt,
            images=tuple(images[row : row + 1]),
            text=text,
            source_images=example.sources,
            target_images=() if example.target is None else (example.target,),
            target_texts=example.texts,
            row=example.row,
        )
        for row, (example, text) in enumerate(zip(examples, texts, strict=True))
    ]


def totals(scored: Sequence[Scored], penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [B] float64 and validity [B]: invalid output earns the penalty, an unavailable judge earns nothing."""
    reward = np.array(
        [penalty if s.total.status == "invalid_output" else s.total.value or 0.0 for s in scored], dtype=np.float64
    )
    valid = np.array([s.total.status != "unavailable" for s in scored])
    return np.where(valid, reward, 0.0), valid


def rollout_figures(
    scored: Sequence[Scored], reward_B: np.ndarray, valid_B: np.ndarray, result: AdvantageResult, made: Trajectory
) -> dict[str, float]:
    """What the step's log says of a rollout, over all processes."""
    mine = (reward_B, valid_B, made.ids.numpy(), made.target_mask.numpy())
    reward, valid, ids, mask = (np.concatenate(gather_arrays(column)) for column in mine)
    groups = [group for part in gather(list(made.group_id)) for group in part]
    figures = {
        "group/flat_share": result.flat_share,
        "group/small_share": result.small_groups / max(1, result.small_groups + result.groups),
        "sample/unavailable_share": 1.0 - float(valid.mean()),
        "sample/invalid_share": float(np.mean([one.status == "invalid_output" for one in everyones_totals(scored)])),
        "sample/duplicate_share": duplicate_share(ids, mask, groups),
        "diversity": diversity(ids, mask, groups),
        "advantage/clipped": float(result.clipped),
        "advantage/abs_mean": float(np.abs(result.advantage_B[result.kept_B]).mean()) if result.kept_B.any() else 0.0,
    }
    figures |= _text_figures(made)
    if valid.any():
        figures |= {"reward/mean": float(reward[valid].mean()), "reward/std": float(reward[valid].std())}
    return figures | term_means(scored, "reward")


def _text_figures(made: Trajectory) -> dict[str, float]:
    """Mean tokens of the texts, and the share of them that did not end before their limit; nothing without texts."""
    span = made.spans[0]
    if span.kind != "text":
        return {}
    text_BS = made.target_mask & (made.span == 0)
    ended_B = (text_BS & torch.isin(made.ids, torch.tensor(span.stop, dtype=torch.long))).any(1)
    lengths, ended = (np.concatenate(gather_arrays(one.numpy())) for one in (text_BS.sum(1), ended_B))
    return {"text/tokens": float(lengths.mean()), "text/cut_share": float(1 - ended.mean())}


def everyones_totals(scored: Sequence[Scored]) -> list[Score]:
    """Of every process's samples the totals without their values: what became of each, and why."""
    parts = gather([[one.total.status, one.total.reason] for one in scored])
    return [Score(status, reason=reason) for part in parts for status, reason in part]


def term_means(scored: Sequence[Scored], prefix: str) -> dict[str, float]:
    """Mean raw value and mean of each part of every term, over every process's samples that have one."""
    mine: dict[str, list[float]] = {}
    for one in scored:
        for name, score in one.terms.items():
            if score.value is not None:
                for part, value in [("mean", score.value), *score.parts.items()]:
                    mine.setdefault(f"{prefix}/{name}/{part}", []).append(float(value))
    values: dict[str, list[float]] = {}
    for part in gather(mine):
        for name, column in part.items():
            values.setdefault(name, []).extend(column)
    return {name: float(np.mean(column)) for name, column in values.items()}


def rollout_path(folder: Path, rollout: int) -> Path:
    rank, size = world()
    return folder / "rollouts" / (f"step-{rollout:06d}" + (f".rank{rank}" if size > 1 else "") + ".parquet")


def store(
    path: Path, rollout: int, experience: Experience, samples: Sequence[Sample], scored: Sequence[Scored]
) -> None:
    """Keep everything of a rollout: a resumed run reads its updates from here, a person its images."""
    columns = scored_columns(rollout, samples, scored)
    apart = experience.advantage if experience.advantage.ndim == 2 else None
    columns |= {"advantage": _of_rows(experience).tolist(), "kept": experience.kept_B.tolist()}
    kept = {
        "token_advantage": apart,
        "old_logp": experience.old_logp_BS,
        "reference_logp": experience.reference_logp_BS,
        "reference_draws": experience.reference_draws_Bn,
    }
    for name, value in kept.items():
        if value is not None:
            columns[name] = list(value.double().numpy())
    with storing(f"rollout {rollout}", path):
        write_trajectory(path, experience.trajectory, columns)


def _of_rows(experience: Experience) -> Tensor:
    """A row's advantage [B]: where tokens earn apart, the mean of its decisions'."""
    if experience.advantage.ndim == 1:
        return experience.advantage
    decided_BS = experience.trajectory.target_mask
    return (experience.advantage * decided_BS).sum(1) / decided_BS.sum(1).clamp(min=1)


def scored_columns(step: int, samples: Sequence[Sample], scored: Sequence[Scored]) -> dict[str, Sequence[Any]]:
    """What was drawn and what each reward said of it, beside the trajectory."""
    columns: dict[str, Sequence[Any]] = {
        "step": [step] * len(samples),
        "prompt": [sample.prompt for sample in samples],
        "image": [png_bytes(sample.images[0]) if sample.images else None for sample in samples],
        "text": [sample.text for sample in samples],
        "reward": [one.total.value for one in scored],
        "reward_status": [one.total.status for one in scored],
        "reward_reason": [one.total.reason for one in scored],
    }
    for name in scored[0].terms:
        columns[f"reward/{name}"] = [one.terms[name].value for one in scored]
        columns[f"reading/{name}"] = [one.terms[name].reason for one in scored]
    return columns


def restore(path: Path) -> Experience:
    """The experience a rollout file holds."""
    trajectory, columns = read_trajectory(path)

    def matrix(name: str) -> Tensor | None:
        return torch.tensor(columns[name], dtype=torch.float32) if name in columns else None

    apart = matrix("token_advantage")
    return Experience(
        trajectory,
        torch.tensor(columns["advantage"], dtype=torch.float32) if apart is None else apart,
        torch.tensor(columns["kept"], dtype=torch.bool),
        matrix("old_logp"),
        matrix("reference_logp"),
        matrix("reference_draws"),
    )


def png_bytes(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


class Timed:
    """Seconds of named phases: `with timed("rollout"): ...` then `figures()` as time/rollout."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with phase(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def rest(self, name: str, other: str) -> Iterator[None]:
        """What a phase takes beside the phase `other` within it."""
        start, before = time.perf_counter(), self.seconds.get(other, 0.0)
        with phase(name):
            yield
        spent = time.perf_counter() - start - (self.seconds.get(other, 0.0) - before)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def figures(self) -> Mapping[str, float]:
        return {f"time/{name}": seconds for name, seconds in self.seconds.items()}


def generate(engine: Engine, response: Response, requests: Sequence[Request], model: torch.nn.Module) -> Trajectory:
    """Sample in evaluation mode, and put the model back as it was."""
    training = model.training
    model.eval()
    try:
        return generate_spans(engine, response.layout, requests, response.spans)
    finally:
        model.train(training)
