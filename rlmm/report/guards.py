"""The hack guards of stored pictures: rollouts over training, each arm's held-out samples, and what both are held
against.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rewards import guards
from rlmm.report.images import MAX_SIDE, decoded
from rlmm.report.records import Curve, Notes, Run, Stage
from rlmm.report.tables import Row, read_rows

STEPS_READ, PICTURES_READ = 24, 96
"""Of a stage's rollouts, so many steps, evenly spread; of a step, an arm or the reference, about so many pictures."""

KEYS = ("guard/blank", "guard/across", "guard/edges", "guard/colours", "guard/repeats")
"""The guards as metrics: share of blank pictures, of like pairs of different prompts, edge density, colour entropy in
bits, and share of look-alikes within a group."""


@dataclass(frozen=True)
class Reference:
    """What pictures are held against. `name` says what it is, `figures` are means by key of `KEYS`."""

    name: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class ArmGuards:
    """One arm's held-out pictures at one temperature."""

    arm: str
    temperature: float
    figures: Mapping[str, float]


def figures(images: Sequence[Image.Image], groups: Sequence[str], prompts: Sequence[str]) -> dict[str, float]:
    """The guards of a set of pictures, by key of `KEYS`; what one cannot be told of too few is left out."""
    if not images:
        return {}
    pixels = [guards.rgb(image) for image in images]
    alike = guards.near_duplicates([guards.fingerprint(image) for image in images])
    found = {
        "guard/blank": float(np.mean([guards.is_blank(one) for one in pixels])),
        "guard/across": guards.alike_across(alike, prompts),
        "guard/edges": float(np.mean([guards.edge_density(one) for one in pixels])),
        "guard/colours": float(np.mean([guards.colour_entropy(one) for one in pixels])),
        "guard/repeats": guards.repeats_within(alike, groups),
    }
    return {key: value for key, value in found.items() if value is not None}


def rollout_guards(stage: Stage, updates_per_rollout: int, notes: Notes) -> dict[str, Curve]:
    """One curve a guard over the steps whose rollouts are stored with pictures."""
    points: dict[str, dict[int, float]] = {}
    for path in spread(one_a_step(stage.rollouts), STEPS_READ):
        rows = read_rows(path, ("prompt", "group_id", "image"), ("step",), (), notes)
        if not rows:
            continue
        step = int(rows[0].get("step") or 0) * updates_per_rollout + 1
        for key, value in _of_rows(_whole_groups(rows, "group_id"), "group_id").items():
            points.setdefault(key, {})[step] = value
    return {key: Curve(*zip(*sorted(values.items()), strict=True)) for key, values in points.items()}


def arm_guards(samples: Path, notes: Notes) -> list[ArmGuards]:
    """The guards of every arm and temperature of a samples.parquet, in stored order."""
    cells: dict[tuple[str, float], list[Row]] = {}
    for row in read_rows(samples, ("arm", "temperature", "prompt", "image"), (), (), notes):
        cells.setdefault((str(row["arm"]), float(row["temperature"])), []).append(row)
    return [ArmGuards(*cell, _of_rows(_whole_groups(rows, "prompt"), "prompt")) for cell, rows in cells.items()]


def reference_of(run: Run) -> Reference | None:
    """Training pictures, where an evaluation kept them; None where none did.

    Edges and colours are those of the pictures as the codec draws them: what it cannot draw is no fault of a policy.
    Blank and like pictures are counted among the pictures themselves: a codec that makes them so excuses nothing.
    """
    for stage in reversed(run.stages):
        if stage.reference is not None:
            rows = read_rows(stage.reference, ("kind", "prompt", "image"), (), (), run.notes)
            by_codec = [[row for row in rows if str(row["kind"]).endswith("codec") is drawn] for drawn in (False, True)]
            found, looks = (_of_rows(part[:PICTURES_READ], "prompt") for part in by_codec)
            found |= {key: looks[key] for key in ("guard/edges", "guard/colours") if key in looks}
            found.pop("guard/repeats", None)  # one picture a prompt has nothing to repeat
            return Reference("training pictures", found) if found else None
    return None


def first_rollouts(curves: Mapping[str, Curve]) -> Reference | None:
    """A stage's own first rollouts, for a run that has no other reference."""
    found = {key: curves[key].values[0] for key in KEYS if key in curves and key != "guard/repeats"}
    return Reference("first rollouts", found) if found else None


def one_a_step(paths: Sequence[Path]) -> list[Path]:
    """Each step's first file: with several processes, that of the first of them."""
    return list({re.sub(r"\.rank\d+$", "", path.stem): path for path in reversed(paths)}.values())[::-1]


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of `paths`, evenly spread, the first and the last among them."""
    if len(paths) <= count:
        return list(paths)
    return [paths[round(place)] for place in np.linspace(0, len(paths) - 1, count)]


def _whole_groups(rows: Iterable[Row], name: str) -> list[Row]:
    """The first groups, whole, until there are enough pictures."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row["image"], bytes):
            groups.setdefault(str(row[name]), []).append(row)
    kept: list[Row] = []
    for members in groups.values():
        if kept and len(kept) + len(members) > PICTURES_READ:
            break
        kept += members
    return kept


def _of_rows(rows: Sequence[Row], group: str) -> dict[str, float]:
    pairs = [(image, row) for row in rows if (image := decoded(row["image"])) is not None]
    for image, _ in pairs:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    images, kept = [image for image, _ in pairs], [row for _, row in pairs]
    return figures(images, [str(row[group]) for row in kept], [str(row["prompt"]) for row in kept])
