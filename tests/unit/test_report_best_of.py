"""Score against samples drawn, on the report."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlmm.report import write_report
from rlmm.report.best_of import best_of_figures
from rlmm.report.data import read_run
from rlmm.report.findings import judge_roles
from rlmm.report.health import health
from tests.synthetic_run import build_run

CURVE = [{"n": n, "mean": mean, "low": mean - 0.1, "high": mean + 0.1} for n, mean in ((1, 0.7), (2, 0.9), (8, 1.3))]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With an arm `sft best of 8`, which tesseract scores a tenth above sft."""
    folder = build_run(tmp_path / "run")
    path = folder / "stages" / "04-eval" / "eval.json"
    record = json.loads(path.read_text())
    best = [row | {"arm": "sft best of 8", "mean": row["mean"] + 0.1} for row in record["rows"] if row["arm"] == "sft"]
    record["rows"] += best
    record["best_of"] = [
        {"arm": "sft best of 8", "of": "sft", "n": 8, "temperature": 1.0, "curve": CURVE},
        {"arm": "sft best of 8", "of": "sft", "n": 8, "temperature": 0.4, "curve": []},
    ]
    path.write_text(json.dumps(record))
    return folder


def test_the_curve_of_the_reward_and_the_two_ends_of_the_held_out_judge_are_drawn(run: Path) -> None:
    read = read_run(run)
    (evaluation,) = [stage.evaluation for stage in read.stages if stage.evaluation]
    reward, held_out = best_of_figures(evaluation, judge_roles(read.stages, read.config), "best-of")
    assert "sft at T = 1: 0.70 at 1, 0.90 at 2, 1.30 at 8" in reward.plot.alt and "T = 0.4" not in reward.plot.alt
    row = next(
        r for r in evaluation.rows if (r.arm, r.judge, r.metric, r.temperature) == ("sft", "tesseract", "exact", 1)
    )
    assert f"sft at T = 1: {row.mean:.2f} at 1, {row.mean + 0.1:.2f} at 8" in held_out.plot.alt
    assert held_out.title == "Best of n by tesseract (held out)"
    page = write_report(run).read_text()
    assert 'id="best-of"' in page and page.count("samples drawn") >= 2


def test_what_only_chooses_among_samples_has_not_learned(run: Path) -> None:
    """Neither where there is no other arm to judge, nor where a dpo stage learned."""
    path = run / "stages" / "04-eval" / "eval.json"
    record = json.loads(path.read_text())
    rows = [row for row in record["contrasts"] if row["baseline"] == "sft"]
    record["contrasts"] += [row | {"arm": arm} for row in rows for arm in ("sft best of 8", "sft-more")]
    record["contrasts"] += [row | {"baseline": "sft best of 8"} for row in rows]
    record["diversity"] += [{"arm": "sft best of 8", "temperature": 1.0, "value": 1e-3}]
    path.write_text(json.dumps(record))
    read = read_run(run)
    (evaluated,) = [stage for stage in read.stages if stage.evaluation]
    learned = tuple(replace(one, kind="dpo") if one.kind == "grpo" else one for one in read.stages)
    others = tuple(one for one in read.stages if one.kind != "grpo")
    for stages in (learned, others):
        (part,) = health(replace(read, stages=stages), [], evaluated).parts
        assert part.checks and all("best of 8" not in check.says for check in part.checks)
        told = " ".join(check.says for check in part.checks)
        assert ("sft-more against sft" in told) == (stages is others)


def test_a_judge_that_was_trained_on_and_an_evaluation_without_such_an_arm_have_no_figure(
    run: Path, tmp_path: Path
) -> None:
    read = read_run(run)
    (evaluation,) = [stage.evaluation for stage in read.stages if stage.evaluation]
    trained = {row.judge: "trained on" for row in evaluation.rows}
    assert len(best_of_figures(evaluation, trained, "x")) == 1  # pyrefly: ignore
    plain = build_run(tmp_path / "plain")
    assert 'id="best-of"' not in write_report(plain).read_text()
