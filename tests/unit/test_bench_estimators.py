"""The table of estimators: what must hold on any policy."""

import json
from pathlib import Path

import pytest

from rlmm.bench.estimators import ESTIMATORS, bench_estimators


def test_the_table_has_every_estimator_and_says_which_are_biased(tmp_path: Path) -> None:
    bench_estimators(2, 4000, tmp_path / "table.json")
    record = json.loads((tmp_path / "table.json").read_text())
    rows = {row["estimator"]: row for row in record["rows"]}
    assert set(ESTIMATORS) < set(rows)
    trajectory = rows["trajectory, all steps"]
    assert trajectory["cosine"] == pytest.approx(1, abs=1e-6) and trajectory["least"] == pytest.approx(1, abs=1e-6)
    assert rows["the ELBO itself, against log pi"]["bias"] > 0.1
    assert rows["the ELBO itself, against log pi"]["cosine"] < 0.99
    for name in ("count", "count, 3 draws", "stratified, 3 draws", "complementary pair (ESPO)"):
        assert rows[name]["bias"] < 0.15
    assert rows["mean field (d1)"]["bias"] > 0.5 < rows["coupled (DiffuCoder)"]["bias"]
    spread = [rows[n]["deviation"] for n in ("stratified, 3 draws", "count, 3 draws", "count", "bernoulli, 1/t")]
    assert spread == sorted(spread)
    assert rows["mean field (d1)"]["deviation"] == pytest.approx(0, abs=1e-6)
