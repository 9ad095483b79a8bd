"""The layout beside a checkpoint, and the one place that spells prompts and images as sequences."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rlmm.policies.base import SequenceBatch
from rollouts.contract import Layout
from rollouts.trajectory import IMAGE, TEXT

LAYOUT_FILE = "layout.json"


def save_layout(layout: Layout, folder: Path) -> None:
    (folder / LAYOUT_FILE).write_text(json.dumps(layout.to_dict(), indent=2))


def load_layout(folder: Path) -> Layout:
    """Raises ValueError where the folder holds none or a broken one."""
    path = folder / LAYOUT_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {LAYOUT_FILE}, so where its image codes lie is unknown; give a folder written by a stage "
            "or by `rlmm export`"
        )
    try:
        return Layout.from_dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a layout ({error!r}); export the checkpoint again") from error


def spell_image(layout: Layout, codes: Sequence[int]) -> list[int]:
    """Token ids of an image span: codes shifted into the image slice, with the grid's forced tokens in place."""
    grid = layout.grid
    decided = grid.decided()
    if len(codes) != len(decided):
        raise ValueError(
            f"{len(codes)} codes for a grid of {grid.rows}x{grid.cols}, {len(decided)} codes; the codec and the layout "
            "disagree: rebuild one of them"
        )
    ids = [grid.forced().get(position, layout.pad) for position in range(grid.length)]
    for position, code in zip(decided, codes, strict=True):
        ids[position] = layout.image[0] + code
    return ids


def read_codes(layout: Layout, ids_BS: Tensor) -> Tensor:
    """Codec codes [B, N] of image spans [B, S]."""
    return ids_BS[:, layout.grid.decided()] - layout.image[0]


@dataclass(frozen=True)
class Supervised:
    """A row to learn from: ids of its prompt, of its spelled source images, and of the text it leads to (its stop token
    included), and the codes of the image after that. Without text and without image there is nothing to learn. `lead`:
    what stands between `bos` and source images."""

    prompt: Sequence[int]
    image: Sequence[int] | None = None
    sources: Sequence[Sequence[int]] = ()
    text: Sequence[int] = ()
    lead: tuple[int, ...] = ()


def supervised_batch(layout: Layout, rows: Sequence[Supervised]) -> SequenceBatch:
    """Prompt, text, image: right-padded. Targets are the image codes and the text, or without a text the prompt's.

    Source images, forced grid tokens, `bos` and begin-of-image are no targets: they are given, and nothing decides
    them. Neither are a template's special tokens that lie outside of the text slice, nor text that no head decides.
    """
    return _right_padded(layout, [_spelled(layout, row) for row in rows])


def _spelled(layout: Layout, row: Supervised) -> tuple[list[int], list[bool], list[int]]:
    """Ids, targets and modalities of a row."""
    asked = replace(layout, lead=row.lead).question(row.prompt, row.sources)
    ids, kinds = [*asked, *row.text], [TEXT] * (len(asked) + len(row.text))
    taught = (len(row.text) or len(row.prompt)) if layout.decides_text else 0
    low, high = layout.text
    targets = [position >= len(ids) - taught and low <= token < high for position, token in enumerate(ids)]
    if row.image is not None:
        positions, span = set(layout.grid.decided()), spell_image(layout, row.image)
        ids += [*layout.boi, *span]
        targets += [False] * len(layout.boi) + [position in positions for position in range(len(span))]
        kinds += [TEXT] * len(layout.boi) + [IMAGE] * len(span)
    return ids, targets, kinds


def _right_padded(layout: Layout, rows: Sequence[tuple[list[int], list[bool], list[int]]]) -> SequenceBatch:
    width = max(len(ids) for ids, _, _ in rows)
    ids = torch.full((len(rows), width), layout.pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    target, modality = mask.clone(), torch.zeros(len(rows), width, dtype=torch.int8)
    for row, (tokens, targets, kinds) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
        target[row, : len(tokens)] = torch.tensor(targets)
        modality[row, : len(tokens)] = torch.tensor(kinds, dtype=torch.int8)
    return SequenceBatch(ids, mask, target, modality)
