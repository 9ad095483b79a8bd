"""The update of a stage that its memory plan runs without memory: what a widest micro-batch holds."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from rlmm.config.preference import DpoStage
from rlmm.config.stages import GrpoStage, PolicyStage, SftStage
from rlmm.dry_run import Update
from rlmm.planned_rows import Row, Rows
from rlmm.readings import gate_reading, supervised_share, update_reading
from rollouts.contract import Layout
from rollouts.law import Law


def law_of(stage: PolicyStage, layout: Layout) -> Law:
    """Of a stage's images."""
    return stage.sampling.law(layout.image) if isinstance(stage, GrpoStage) else Law(layout.image)


def update_of(stage: PolicyStage, layout: Layout, rows: Rows, processes: int) -> Update:
    """Of sequences as long as `rows`."""
    streams = len(law_of(stage, layout).streams(replay=True))
    positions = len(layout.grid.decided())
    parts = list(_micro_batch(stage, rows))
    sequences, drawn = sum(count for count, _ in parts), sum(count for count, row in parts if row.image)
    read = None if layout.mask is None else update_reading(stage, positions)
    if read is not None:
        read = replace(read, decisions=read.decisions * drawn // sequences)
    return Update(
        rows=streams * (sequences if read is None else read.states),
        streams=streams,
        length=max(row.length for count, row in parts if count),
        decided=positions if drawn else 0,
        again=_step(stage) > stage.micro_batch_size * processes,
        precision=stage.precision,
        checkpointing=stage.gradient_checkpointing,
        image_rows=isinstance(stage, GrpoStage) and stage.trains_image_rows(processes, cuda=torch.cuda.is_available()),
        read=read,
        gate=None if layout.mask is None else gate_reading(stage, positions),
        text=round(sum(count * _text(stage, layout, row, positions) for count, row in parts)),
        drawn=drawn,
        entropy=isinstance(stage, GrpoStage) and stage.objective.entropy.coefficient > 0,
    )


def _micro_batch(stage: PolicyStage, rows: Rows) -> Iterator[tuple[int, Row]]:
    """Sequences of a next-token policy's widest micro-batch: how many, and what they are like."""
    size = stage.micro_batch_size
    if isinstance(stage, DpoStage):
        sides = size * (1 if stage.loss == "kto" else 2)
        yield sides, rows.own
        if rows.beside is not None:
            yield sides, rows.beside
    elif isinstance(stage, SftStage) and rows.beside is not None:
        # A step's rows are sorted by their length, and its last micro-batch has the longest.
        others = stage.rows_beside * stage.rows_each
        kinds = [(stage.batch_size - others, rows.own), (others, rows.beside)]
        (most, longer), (_, shorter) = sorted(kinds, key=lambda kind: -kind[1].length)
        yield min(size, most), longer
        yield size - min(size, most), shorter
    else:
        yield size, rows.own


def _step(stage: PolicyStage) -> int:
    """Rows of a step, over all processes."""
    if isinstance(stage, GrpoStage):
        return stage.rollouts // stage.objective.updates_per_rollout
    assert isinstance(stage, SftStage | DpoStage), "no other stage trains a policy"
    return stage.batch_size


def _text(stage: PolicyStage, layout: Layout, row: Row, positions: int) -> float:
    """Decisions of text in a sequence: what the policy writes or is taught, or what it learns of prompts."""
    if not isinstance(stage, SftStage):
        return row.text
    if not layout.decides_text:
        return 0
    share = 1.0 if layout.mask is None else supervised_share(stage, positions) * (stage.text_weight > 0)
    return share * (row.text or row.prompt)
