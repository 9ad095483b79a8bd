"""A whole evidence plan in small: tuned, trained on two seeds, compared, written; a second call does nothing again."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlmm.evidence.ablation import run_ablation
from rlmm.evidence.plan import AblationPlan, EvidencePlan, read_plan
from rlmm.evidence.run import run_plan
from tests.unit.test_evidence import ABLATION

TINY = Path(__file__).parents[1] / "recipes" / "tiny_evidence.yaml"


def test_a_plan_runs_whole_and_only_once(tmp_path: Path) -> None:
    plan, said = read_plan(TINY, EvidencePlan), []
    record = run_plan(plan, tmp_path / "runs", tmp_path / "out", said.append)
    written = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert list(record["arms"]) == ["sft", "sft_more", "sft_fresh", "grpo"]
    for name, arm in record["arms"].items():
        tried = {(row["trial"], row["temperature"]): row["score"] for row in record["tuning"]}
        chosen = arm["chosen"]
        best = max(score for (trial, _), score in tried.items() if trial.rsplit("-", 1)[0] == name)
        assert chosen["score"] == tried[f"{name}-{chosen['trial']}", chosen["temperature"]] == best
        for i, seed in enumerate(plan.seeds):
            run = tmp_path / "runs" / f"seed-{seed}" / "stages"
            rows = json.loads(next(run.glob("*-evaluation/eval.json")).read_text())["rows"]
            (mean,) = [
                row["mean"]
                for row in rows
                if (row["arm"], row["temperature"], row["judge"], row["metric"])
                == (name, chosen["temperature"], "left_darkness", "value")
            ]
            assert arm["values"][i] == arm["by_temperature"][f"{chosen['temperature']:g}"][i] == mean
    asked = {
        name: set(pq.read_table(next(runs.glob("stages/*-evaluation/samples.parquet")))["prompt"].to_pylist())
        for name in ("tune-start", "tune-arms", "seed-1", "seed-2")
        for runs in [tmp_path / "runs" / name]
    }
    assert asked["tune-start"] == asked["tune-arms"] and asked["seed-1"] == asked["seed-2"]
    assert len(asked["seed-1"]) == 4 and not asked["seed-1"] & asked["tune-start"]
    assert all(value >= 0 for values in record["compute"]["seconds"].values() for value in values)
    page = (tmp_path / "out" / "tiny.md").read_text()
    assert "| grpo - sft_more |" in page and "tiny.png" in page
    assert Image.open(tmp_path / "out" / "tiny.png").width > 600
    # The tuned SFT settings decide where the arms start.
    steps = plan.start.trials[record["arms"]["sft"]["chosen"]["trial"]]["steps"]
    metrics = next((tmp_path / "runs" / "seed-1" / "stages").glob("*-sft/metrics.jsonl")).read_text()
    assert len(metrics.splitlines()) == steps

    said.clear()
    assert run_plan(plan, tmp_path / "runs", tmp_path / "out", said.append)["arms"] == record["arms"]
    assert not [line for line in said if line.endswith(("(codec)", "(sft)", "(grpo)", "(eval)"))]


@pytest.mark.long
def test_a_plan_may_have_arms_of_several_stages_and_the_best_of_n(tmp_path: Path) -> None:
    whole = read_plan(TINY, EvidencePlan).model_dump(mode="json")
    pairs = {"kind": "pairs", "prompts": 4, "samples_per_prompt": 4}
    dpo = {"kind": "dpo", "steps": 1, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3}
    whole["start"]["trials"] = [{"steps": 2}]
    whole["arms"] = {"dpo": {"before": [pairs, dpo, pairs], "stage": dpo, "trials": [{}]}}
    record = run_plan(
        EvidencePlan.model_validate(whole | {"best_of": 2}), tmp_path / "runs", tmp_path / "out", lambda line: None
    )
    assert list(record["arms"]) == ["sft", "dpo", "sft best of 2"]
    assert record["arms"]["sft best of 2"]["chosen"]["settings"]["best_of"] == 2
    assert record["compute"]["seconds"]["sft best of 2"] == [0.0, 0.0]
    assert all(seconds > 0 for seconds in record["compute"]["seconds"]["dpo"])
    assert "| sft best of 2 - dpo |" in (tmp_path / "out" / "tiny.md").read_text()


@pytest.mark.long
def test_an_ablation_runs_whole(tmp_path: Path) -> None:
    plan = AblationPlan.model_validate(ABLATION)
    record = run_ablation(plan, tmp_path / "run", tmp_path / "out", lambda line: None)
    assert json.loads((tmp_path / "out" / "tiny.json").read_text()) == json.loads(json.dumps(record))
    objective, kl = record["factors"]["objective"], record["factors"]["KL"]
    assert list(objective) == ["grpo", "dapo"] and objective["grpo"] == kl["0"] != kl["0.1"]
    assert all(len(one["reward"]) == 2 and one["seconds"] >= 0 for one in [*objective.values(), *kl.values()])
    assert kl["0"]["best"] == max(kl["0"]["by_temperature"].values())
    page = (tmp_path / "out" / "tiny.md").read_text()
    assert "| objective | **grpo** |" in page and "| KL | 0.1 |" in page
    assert Image.open(tmp_path / "out" / "tiny.png").width > 600


def test_a_judge_that_is_not_there_is_named_before_anything_runs(tmp_path: Path) -> None:
    plan = read_plan(TINY, EvidencePlan).model_copy(update={"judge": "tesseract"})
    with pytest.raises(ValueError, match="'tesseract' is no held-out judge of tests/recipes/tiny.yaml"):
        run_plan(plan, tmp_path / "runs", tmp_path / "out", lambda line: None)
