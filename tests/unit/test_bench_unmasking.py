"""The bench of unmasking: what it writes, and that the published loop really reveals everything."""

import json
from pathlib import Path

from rlmm.bench.unmasking import Problem, UnmaskingPlan, bench_unmasking

PLAN = UnmaskingPlan("tiny", samples=4, tokens=16, steps=4, repeats=1, threads=1)


def test_every_way_is_measured_and_written(tmp_path: Path) -> None:
    bench_unmasking(PLAN, tmp_path / "unmasking.json")
    record = json.loads((tmp_path / "unmasking.json").read_text())
    assert [row["what"] for row in record["rows"]][:3] == ["published", "random order", "confidence"]
    assert [row["forwards"] for row in record["rows"]] == [4] * 4 + [8] * 4
    assert all(row["seconds"] > 0 for row in record["rows"]) and record["update"]["ratio"] > 0
    assert record["rows"][0]["ratio"] == record["rows"][4]["ratio"] == 1


def test_the_published_loop_leaves_nothing_masked_and_draws_image_codes_alone() -> None:
    problem = Problem(PLAN)
    for scale in (1.0, 3.0):
        ids = problem.published(scale)
        low, high = problem.layout.image
        assert ids.shape == (4, 16) and bool(((ids >= low) & (ids < high)).all())
