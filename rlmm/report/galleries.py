"""Picks the images that the page shows, from parquet: samples of the arms side by side, and groups of
rollouts.

What is shown is the first of what is stored, in stored order: nothing is chosen by how it looks or scores.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlmm.report.images import Picture, picture
from rlmm.report.records import Notes
from rlmm.report.tables import Row, number, read_rows, text

PROMPTS_SHOWN = 12
GROUPS_SHOWN = 3


@dataclass(frozen=True)
class Verdict:
    """What one judge made of one image."""

    judge: str
    score: float | None
    reading: str | None


@dataclass(frozen=True)
class ArmSample:
    """One arm's image for a prompt and seed, and what it wrote before the image or instead of one."""

    arm: str
    picture: Picture | None
    why_missing: str
    verdicts: tuple[Verdict, ...]
    wrote: str = ""


@dataclass(frozen=True)
class Comparison:
    """One prompt with the image of each arm, drawn with the same seed; `source`: the image that the prompt is about."""

    prompt: str
    seed: int
    samples: tuple[ArmSample, ...]
    source: Picture | None = None


@dataclass(frozen=True)
class GroupMember:
    """One rollout of a group; `reward` is None where the judge failed or the output could not be judged."""

    picture: Picture | None
    why_missing: str
    reward: float | None
    status: str
    reason: str
    advantage: float | None
    terms: tuple[tuple[str, float], ...]
    wrote: str = ""


@dataclass(frozen=True)
class Group:
    """The rollouts for one prompt at one step, highest advantage first."""

    prompt: str
    members: tuple[GroupMember, ...]


def comparisons(path: Path, notes: Notes) -> dict[float, list[Comparison]]:
    """The first prompts of a samples.parquet by temperature, highest first, each prompt at its first seed."""
    rows = read_rows(
        path, ("arm", "temperature", "seed", "prompt"), ("image", "text", "source"), ("score/", "reading/"), notes
    )
    arms = list(dict.fromkeys(str(row["arm"]) for row in rows))
    shown: dict[float, dict[str, dict[str, Row]]] = {}
    seeds: dict[tuple[float, str], int] = {}
    for row in rows:
        temperature, prompt = float(row["temperature"]), str(row["prompt"])
        by_prompt = shown.setdefault(temperature, {})
        if prompt not in by_prompt and len(by_prompt) >= PROMPTS_SHOWN:
            continue
        if seeds.setdefault((temperature, prompt), int(row["seed"])) == int(row["seed"]):
            by_prompt.setdefault(prompt, {}).setdefault(str(row["arm"]), row)
    broken: list[str] = []
    found = {
        temperature: [
            Comparison(
                prompt,
                seeds[temperature, prompt],
                tuple(_arm_sample(arm, by_arm.get(arm), broken) for arm in arms),
                _source(by_arm.values()),
            )
            for prompt, by_arm in shown[temperature].items()
        ]
        for temperature in sorted(shown, reverse=True)
    }
    _note_broken(path, broken, notes)
    return found


def groups(path: Path, notes: Notes) -> tuple[int | None, list[Group]]:
    """The step and the first groups of one rollouts file."""
    rows = read_rows(
        path,
        ("prompt", "group_id", "reward"),
        ("step", "image", "text", "reward_status", "reward_reason", "advantage"),
        ("reward/",),
        notes,
    )
    by_group: dict[str, list[Row]] = {}
    for row in rows:
        if str(row["group_id"]) in by_group or len(by_group) < GROUPS_SHOWN:
            by_group.setdefault(str(row["group_id"]), []).append(row)
    broken: list[str] = []
    found = [Group(str(members[0]["prompt"]), _members(members, broken)) for members in by_group.values()]
    _note_broken(path, broken, notes)
    return _step(rows), found


def first_middle_last(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """The first, the middle and the last of `paths` with what to call them; fewer where there are fewer
    paths.
    """
    if len(paths) < 3:
        return list(zip(("First", "Last"), paths, strict=False))
    return [("First", paths[0]), ("Middle", paths[len(paths) // 2]), ("Last", paths[-1])]


def _arm_sample(arm: str, row: Row | None, broken: list[str]) -> ArmSample:
    if row is None:
        return ArmSample(arm, None, "not drawn", ())
    judges = sorted(key.removeprefix("score/") for key in row if key.startswith("score/"))
    verdicts = tuple(Verdict(j, number(row[f"score/{j}"]), text(row.get(f"reading/{j}"))) for j in judges)
    told = ", ".join(f"{v.judge} scores it {v.score:.2f}" for v in verdicts if v.score is not None)
    alt = f"{arm}, T={row['temperature']:g}, for the prompt: {row['prompt']}." + (f" {told}." if told else "")
    shown, why = _picture(row, alt, broken)
    return ArmSample(arm, shown, why, verdicts, text(row.get("text")) or "")


def _source(rows: Iterable[Row]) -> Picture | None:
    """The first source image that is there and can be read."""
    given = next((row["source"] for row in rows if isinstance(row.get("source"), bytes)), None)
    return None if given is None else picture(given, "The image that the prompt is about.")


def _members(rows: list[Row], broken: list[str]) -> tuple[GroupMember, ...]:
    members = [_member(row, broken) for row in rows]
    return tuple(sorted(members, key=lambda m: -math.inf if m.advantage is None else m.advantage, reverse=True))


def _member(row: Row, broken: list[str]) -> GroupMember:
    reward, advantage = number(row["reward"]), number(row.get("advantage"))
    status = text(row.get("reward_status")) or ("ok" if reward is not None else "unavailable")
    told = f"reward {reward:.2f}" if reward is not None else status.replace("_", " ")
    shown, why = _picture(row, f"Rollout for the prompt: {row['prompt']}, {told}.", broken)
    terms = {key.removeprefix("reward/"): number(row[key]) for key in row if key.startswith("reward/")}
    named = tuple((name, value) for name, value in terms.items() if value is not None)
    reason, wrote = text(row.get("reward_reason")) or "", text(row.get("text")) or ""
    return GroupMember(shown, why, reward, status, reason, advantage, named, wrote)


def _picture(row: Row, alt: str, broken: list[str]) -> tuple[Picture | None, str]:
    data = row.get("image")
    if data is None:
        return None, "" if text(row.get("text")) else "image not stored"
    shown = picture(data, alt) if isinstance(data, bytes) else None
    if shown is None:
        broken.append(alt)
        return None, "image cannot be read"
    return shown, ""


def _step(rows: list[Row]) -> int | None:
    step = rows[0].get("step") if rows else None
    return int(step) if step is not None else None


def _note_broken(path: Path, broken: list[str], notes: Notes) -> None:
    if broken:
        notes.add(f"{'/'.join(path.parts[-3:])}: {len(broken)} shown image(s) cannot be read.")
