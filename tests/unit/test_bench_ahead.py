"""The bench of rollouts drawn ahead: what is compared, and what it writes."""

import json
from pathlib import Path

import pytest

from rlmm.bench.ahead import AheadPlan, bench_ahead


@pytest.mark.long
def test_every_way_is_measured_with_every_judge(tmp_path: Path) -> None:
    bench_ahead(AheadPlan((0.0, 0.2), steps=3, repeats=1, threads=1), tmp_path / "ahead.json")
    record = json.loads((tmp_path / "ahead.json").read_text())
    assert [(row["latency"], row["way"]) for row in record["rows"]] == [
        (latency, way) for latency in (0.0, 0.2) for way in ("in turns", "scored behind", "drawn ahead")
    ]
    for row in record["rows"]:
        assert row["step"] >= row["latency"] and row["limit"] >= 1
        assert set(row["phases"]) == {"rollout", "score", "replay", "update"}
    assert record["rows"][0]["ratio"] == 1
