"""What the page shows of the arms' understanding: a table, and the first questions with every arm's answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlmm.report.images import Picture, picture
from rlmm.report.records import Notes, Stage, Understood
from rlmm.report.tables import Row, read_rows


@dataclass(frozen=True)
class Question:
    """A question, the image it is about, and what each arm answered."""

    prompt: str
    picture: Picture | None
    reference: str
    answers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Understanding:
    """`rows`: (arm, (mean, interval) a metric)."""

    questions: int
    metrics: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    questions_shown: tuple[Question, ...]


def understood(stage: Stage | None, notes: Notes) -> Understanding:
    """Of the stage that evaluated; empty where it asked nothing."""
    found = stage.evaluation.understood if stage is not None and stage.evaluation is not None else ()
    metrics = tuple(dict.fromkeys(row.metric for row in found))
    by_arm = {arm: {row.metric: row for row in found if row.arm == arm} for arm in dict.fromkeys(r.arm for r in found)}
    rows = tuple((arm, tuple(_cell(cells.get(metric)) for metric in metrics)) for arm, cells in by_arm.items())
    shown = _questions(stage, notes) if stage is not None and found else ()
    return Understanding(max((row.n for row in found), default=0), metrics, rows, shown)


def _cell(row: Understood | None) -> tuple[str, str]:
    if row is None:
        return "–", ""
    interval = "" if row.low is None or row.high is None else f"[{row.low:.3f}, {row.high:.3f}]"
    return f"{row.mean:.3f}", interval


def _questions(stage: Stage, notes: Notes) -> tuple[Question, ...]:
    if stage.answers is None:
        return ()
    rows = read_rows(stage.answers, ("arm", "prompt", "answer", "reference"), ("source",), (), notes)
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(str(row["arm"]), []).append(row)
    return tuple(_question(list(arms), asked) for asked in zip(*arms.values(), strict=False))


def _question(arms: Sequence[str], asked: Sequence[Row]) -> Question:
    """The same question to every arm, in the arms' order."""
    prompt, source = str(asked[0]["prompt"]), asked[0].get("source")
    shown = picture(source, f"The image that is asked about: {prompt}") if isinstance(source, bytes) else None
    answers = tuple((arm, str(row["answer"])) for arm, row in zip(arms, asked, strict=True))
    return Question(prompt, shown, str(asked[0]["reference"]), answers)
