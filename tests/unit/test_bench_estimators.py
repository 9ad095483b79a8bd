"""The table of estimators: what must hold on any policy."""

import json

import pytest

from rlmm.bench.estimators import ESTIMATORS, bench_estimators


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("bench") / "table.json"
    bench_estimators(2, 4000, path)
    return json.loads(path.read_text())


def test_the_table_has_every_estimator_and_says_which_are_biased(record: dict) -> None:
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
    few = rows["trajectory, 1 of 3 steps"]
    assert few["bias"] < 0.3 < few["deviation"] and few["least"] > 0.99
    assert rows["confident order, all of it"]["least"] == pytest.approx(1, abs=1e-6)
    tokens, whole, field = (
        rows[f"confident order, {of}"] for of in ("tokens alone (dLLM-RL)", "the ELBO", "mean field")
    )
    assert 0.9999 > tokens["cosine"] > whole["cosine"] > field["cosine"]
    mixed = rows["sandwich (SPG), 3 draws"]
    assert mixed["bias"] is None and 0.8 < mixed["least"] < 0.9999


def test_what_else_enumeration_tells(record: dict) -> None:
    figures = record["figures"]
    assert 0 < figures["gap"] < figures["most_gap"]
    assert 20 * figures["shared"] < figures["apart"]
    assert 0 < figures["violated"] < 0.5
