"""A run with preferences: what its stages leave, what they learn from, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from rlmm.cli import app
from rlmm.codecs import load_codec, tensor_to_images
from rlmm.config.recipe import Recipe, RecipeError, read_recipe
from rlmm.evaluation.evaluate import run_eval
from rlmm.pipeline import run_recipe
from rlmm.policies.families.loading import load_policy
from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.run_folder import RunFolder
from rlmm.train.context import StageContext
from rlmm.train.dpo import run_dpo
from rlmm.train.metrics import MetricsFile
from rollouts.store import read_trajectory
from rollouts.trajectory import IMAGE
from tests.integration.conftest import TinyRun
from tests.recipes.rewards import darkness, left_darkness

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_dpo.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    recipe = read_recipe(RECIPE, [f"run_dir={tmp_path_factory.mktemp('dpo') / 'run'}"])
    said: list[str] = []
    return TinyRun(recipe, run_recipe(recipe, said.append), said)


def pairs(run: TinyRun, stage: str = "pairs") -> list[dict[str, Any]]:
    return pq.read_table(run.folder.stage(stage) / "pairs.parquet").to_pylist()


def test_a_pair_is_of_one_prompts_best_and_worst_sample(run: TinyRun) -> None:
    rows = pairs(run)
    assert len(rows) == 14 and len({row["group_id"] for row in rows}) == 7
    drawn: dict[str, dict[str, Any]] = {}
    for path in sorted((run.folder.stage("pairs") / "rollouts").glob("*.parquet")):
        made, columns = read_trajectory(path)
        for i, name in enumerate(made.sample_id):
            drawn[name] = {"group": made.group_id[i], "reward": columns["reward"][i], "image": columns["image"][i]}
    for row in rows:
        best, worst = drawn[row["chosen_id"]], drawn[row["rejected_id"]]
        assert best["group"] == worst["group"] == row["group_id"]
        assert row["margin"] == row["chosen_score"] - row["rejected_score"] > 0
        for side, sample in (("chosen", best), ("rejected", worst)):
            assert row[side]["bytes"] == sample["image"]
            picture = Image.open(io.BytesIO(sample["image"]))
            assert row[f"{side}_score"] == sample["reward"] == pytest.approx(darkness([""], [picture])[0], abs=1e-12)
    first = [one["reward"] for one in drawn.values() if one["group"] == rows[0]["group_id"]]
    assert (rows[0]["chosen_score"], rows[0]["rejected_score"]) == (max(first), min(first))


def test_a_pairs_images_are_its_codes(run: TinyRun) -> None:
    codec = load_codec(run.folder.stage("codec") / "codec").eval()
    row = pairs(run)[0]
    with torch.no_grad():
        (image,) = tensor_to_images(codec.decode(torch.tensor([row["chosen_codes"]])))
    assert image.tobytes() == Image.open(io.BytesIO(row["chosen"]["bytes"])).tobytes()
    assert row["origin"] == "sft" and json.loads(row["law"])[0]["law"]["temperature"] == 1.0


def test_the_report_of_margins_counts_them_all(run: TinyRun) -> None:
    record = json.loads((run.folder.stage("pairs") / "margins.json").read_text())
    rows = pairs(run)
    assert (record["pairs"], record["prompts"], record["samples"]) == (len(rows), 7, 28)
    assert sum(record["histogram"]["counts"]) == len(rows)
    assert record["margin"]["most"] == max(row["margin"] for row in rows)
    assert Image.open(run.folder.stage("pairs") / "margins.png").width > 400
    page = (run.folder.path / "report.html").read_text()
    assert "How far apart the scores of a pair are" in page and "Pairs in the right order" in page
    assert "Groups of rollouts" not in page and "Not there yet" not in page


def log_probs(folder: Path, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Of the images (chosen, rejected) of each pair under a stage's model."""
    policy = load_policy(folder)
    values = []
    for row in rows:
        prompt = policy.encode_prompt(row["prompt"])
        sides = [Supervised(prompt, row[f"{side}_codes"]) for side in ("chosen", "rejected")]
        batch = supervised_batch(policy.layout, sides)
        with torch.no_grad():
            logp = policy.sequence_log_probs(batch)
        values.append(torch.where(batch.modality_BT == IMAGE, logp, 0).sum(1))
    return torch.stack(values).double()


@pytest.mark.parametrize(("stage", "made"), [("dpo", "pairs"), ("dpo2", "pairs2")])
def test_the_stored_reference_is_the_named_stages(run: TinyRun, stage: str, made: str) -> None:
    """Both refer to sft: dpo because it starts there, dpo2, which starts from dpo, by name."""
    found = load_file(run.folder.stage(stage) / "reference" / "000000.safetensors")["log_probs"]
    wanted = log_probs(run.folder.stage("sft") / "model", pairs(run, made))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    other = log_probs(run.folder.stage("dpo") / "model", pairs(run, made))
    assert float((other - wanted).abs().max()) > 1e-3


def test_dpo_makes_chosen_images_likelier_than_before(run: TinyRun) -> None:
    rows = pairs(run)
    before, after = (log_probs(run.folder.stage(stage) / "model", rows) for stage in ("sft", "dpo"))
    gain = (after - before) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert float(gain.mean()) > 0
    logged = MetricsFile(run.folder.stage("dpo") / "metrics.jsonl").read()
    assert logged[0]["dpo/margin"] == pytest.approx(0, abs=1e-5) and logged[-1]["dpo/margin"] > 0


def test_an_evaluation_counts_what_an_arm_grew_from(run: TinyRun) -> None:
    record = json.loads((run.folder.stage("evaluation") / "eval.json").read_text())
    stages = {row["arm"]: row["stages"] for row in record["compute"]}
    assert stages["dpo"] == ["sft", "pairs", "dpo"]
    assert stages["dpo2"] == ["sft", "pairs", "dpo", "pairs2", "dpo2"]
    card = (run.folder.path / "merged" / "README.md").read_text()
    assert "dpo, sigmoid loss, beta 0.1" in card


def stage_of(run: TinyRun, folder: Path, **changes: Any) -> tuple[StageContext, list[str]]:
    """A dpo stage of the run in a folder of its own."""
    raw = run.recipe.model_dump(mode="json")
    raw["stages"]["dpo"] |= {"lora": None, "start_from": "sft", **changes}
    recipe, said = Recipe.model_validate(raw), []
    config = recipe.stages["dpo"]
    folder.mkdir()
    return StageContext(recipe, RunFolder(run.folder.path, run.folder.stages), "dpo", config, said.append, folder), said


def test_preferences_from_elsewhere_train_as_the_stages_own_do(run: TinyRun, tmp_path: Path) -> None:
    table = pq.read_table(run.folder.stage("pairs") / "pairs.parquet")
    path = tmp_path / "public.parquet"
    pq.write_table(table.select(["prompt", "chosen_codes", "rejected_codes", "chosen", "rejected"]), path)
    data = {"path": str(path), "cache_dir": str(tmp_path / "cache")}
    weights = []
    for name, change in (("own", {}), ("public", {"pairs": None, "data": data})):
        context, _ = stage_of(run, tmp_path / name, **change)
        run_dpo(context)
        weights.append(load_file(context.model_folder / "model.safetensors"))
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, rtol=0, atol=0)


def test_a_reference_of_other_weights_or_pairs_is_refused(run: TinyRun, tmp_path: Path) -> None:
    context, _ = stage_of(run, tmp_path / "one", steps=1)
    run_dpo(context)
    other, _ = stage_of(run, tmp_path / "two", steps=1, reference="policy")
    (context.folder / "reference").rename(other.folder / "reference")
    with pytest.raises(ValueError, match="of another reference or of other preferences"):
        run_dpo(other)
    (other.folder / "reference").rename(tmp_path / "away")
    run_dpo(other)
    places = (other.folder / "reference", tmp_path / "away")
    mine, theirs = (load_file(place / "000000.safetensors") for place in places)
    assert not mine["log_probs"].equal(theirs["log_probs"])


def test_kto_and_other_losses_run_and_hold_a_reference(run: TinyRun, tmp_path: Path) -> None:
    for loss, extra in (("kto", {"desirable_weight": 1.5}), ("hinge", {}), ("ipo", {"label_smoothing": 0.1})):
        context, _ = stage_of(run, tmp_path / loss, loss=loss, steps=2, checkpoint_every=2, **extra)
        run_dpo(context)
        logged = MetricsFile(context.folder / "metrics.jsonl").read()
        assert len(logged) == 2 and ("dpo/point" in logged[0]) == (loss == "kto")
        assert (context.folder / "reference").is_dir() == (loss != "kto")


def test_too_many_bad_pairs_stop_the_stage_and_a_few_are_said(run: TinyRun, tmp_path: Path) -> None:
    rows = pq.read_table(run.folder.stage("pairs") / "pairs.parquet").to_pylist()
    rows[0]["chosen_codes"] = rows[0]["chosen_codes"][:-1]
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    data = {"path": str(path), "cache_dir": str(tmp_path / "cache")}
    context, _ = stage_of(run, tmp_path / "strict", pairs=None, data=data)
    with pytest.raises(ValueError, match="1 of 14 preferences are bad .1 codes shorter than the grid.*row 0: "):
        run_dpo(context)
    context, said = stage_of(run, tmp_path / "lax", pairs=None, data=data | {"max_excluded_share": 0.1}, steps=1)
    run_dpo(context)
    assert any("13 of 14 rows, excluded 1 codes shorter than the grid" in line for line in said)
    assert json.loads((context.folder / "preferences.json").read_text())["kept"] == 13


def test_pairs_of_stored_rollouts(tiny_run: TinyRun, tmp_path: Path) -> None:
    """By the scores stored with them, and by a reward that sees the same rows again."""
    out = tmp_path / "stored"
    answer = CliRunner().invoke(app, ["pairs", str(tiny_run.folder.path), str(out), "rollouts=grpo"])
    assert answer.exit_code == 0, answer.output
    rows = pq.read_table(out / "pairs.parquet").to_pylist()
    assert {row["file"] for row in rows} == {f"step-00000{i}.parquet" for i in range(3)}
    assert {row["weights_version"] for row in rows} == {0, 1, 2} and {row["origin"] for row in rows} == {"grpo"}
    reward = 'rewards={"terms": [{"function": "tests/recipes/rewards.py:left_darkness"}]}'
    again = tmp_path / "again"
    answer = CliRunner().invoke(app, ["pairs", str(tiny_run.folder.path), str(again), "rollouts=grpo", reward])
    assert answer.exit_code == 0, answer.output
    for row in pq.read_table(again / "pairs.parquet").to_pylist():
        picture = Image.open(io.BytesIO(row["chosen"]["bytes"]))
        wanted = left_darkness([""], [picture])[0]
        assert row["chosen_score"] == pytest.approx(wanted, abs=1e-9)


def test_a_folder_of_pairs_does_not_go_on_with_samples_drawn_otherwise(run: TinyRun, tmp_path: Path) -> None:
    def made(*settings: str) -> Any:
        given = ["pairs", str(run.folder.path), str(tmp_path / "out"), "prompts=2", "samples_per_prompt=4", *settings]
        return CliRunner().invoke(app, given)

    assert made("start_from=sft").exit_code == 0 and made("start_from=sft", "pairs_per_prompt=2").exit_code == 0
    assert len(pq.read_table(tmp_path / "out" / "pairs.parquet")) == 4
    for settings, told in (
        (("start_from=dpo",), "start_from: 'sft' -> 'dpo'"),
        (("start_from=sft", "sampling={temperature: 0.5}"), "sampling.temperature: 1.0 -> 0.5"),
    ):
        with pytest.raises(ValueError, match=f"samples that were drawn otherwise:\n  {told}"):
            raise made(*settings).exception or AssertionError("it went on")


def test_stages_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for override, message in (
        ("stages.dpo.pairs=pair", "pairs names 'pair', which is no pairs stage before it. Nearest: pairs"),
        ("stages.dpo.pairs=pairs2", "which is no pairs stage before it"),
        ("stages.dpo.reference=dpo2", "refers to 'dpo2', which is no policy stage before it"),
        ("stages.pairs.rollouts=sft", "is of samples drawn anew"),
        ("stages.dpo2.label_smoothing=0.5", "less than 0.5"),
        (
            "stages.dpo.loss=sigmod",
            r"stages.dpo.loss: .* should be 'sigmoid', 'ipo', 'hinge' or 'kto' \(given: 'sigmod'\)",
        ),
        ("stages.dpo.loss=kto stages.dpo.label_smoothing=0.1", "label_smoothing is of pairs"),
        ("stages.dpo.noise={}", "noise is of masked policies"),
        ("stages.pairs.pairs_per_prompt=3", "make at most 2 pairs"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_recipe(RECIPE, [str(part) for part in override.split(" ")])


def test_best_of_n_is_an_arm_of_an_evaluation(run: TinyRun, tmp_path: Path) -> None:
    raw = run.recipe.model_dump(mode="json")
    raw["stages"]["evaluation"] |= {"arms": ["sft", "dpo"], "best_of": {"sft": 4}, "temperatures": [1.0]}
    recipe = Recipe.model_validate(raw)
    (tmp_path / "eval").mkdir()
    said: list[str] = []
    context = StageContext(
        recipe, run.folder, "evaluation", recipe.stages["evaluation"], said.append, tmp_path / "eval"
    )
    run_eval(context)
    record = json.loads((tmp_path / "eval" / "eval.json").read_text())
    means = {row["arm"]: row["mean"] for row in record["rows"] if row["judge"] == "darkness"}
    assert list(means) == ["sft", "sft best of 4", "dpo"] and means["sft best of 4"] > means["sft"]
    (drawn,) = record["best_of"]
    assert [point["n"] for point in drawn["curve"]] == [1, 2, 4, 8]
    # Two choices among four each: their mean is near what the curve expects of four.
    assert means["sft best of 4"] == pytest.approx(drawn["curve"][2]["mean"], abs=5e-4)
    # What was trained is held against what only chooses, and stands before it.
    compared = dict.fromkeys((row["arm"], row["baseline"]) for row in record["contrasts"])
    assert list(compared) == [("dpo", "sft"), ("dpo", "sft best of 4"), ("sft best of 4", "sft")]
    assert any("draws 4 samples for one" in line for line in said)


def test_the_command_shows_the_best(run: TinyRun, tmp_path: Path) -> None:
    out, model = tmp_path / "best.png", str(run.folder.stage("sft") / "model")
    asked = ["sample", model, 'render "HELLO"', "--samples", "2", "--out", str(out)]
    chosen = ["--best-of", "5", "--reward", "tests/recipes/rewards.py:darkness"]
    answer = CliRunner().invoke(app, [*asked, *chosen])
    assert answer.exit_code == 0, answer.output
    assert "best of 4: " in answer.output and Image.open(out).width == 2 * (96 + 4) + 4
    assert isinstance(CliRunner().invoke(app, [*asked, "--best-of", "5"]).exception, ValueError)


def test_a_masked_policy_learns_from_its_pairs(tmp_path: Path) -> None:
    raw = yaml.safe_load((RECIPE.parent / "tiny_masked.yaml").read_text()) | {"run_dir": str(tmp_path / "run")}
    stages = {name: raw["stages"][name] for name in ("codec", "sft")}
    dpo = {"kind": "dpo", "steps": 2, "batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-3, "pairs": "pairs"}
    stages["pairs"] = {"kind": "pairs", "prompts": 4, "samples_per_prompt": 4, "sampling": {"unmasking": {"steps": 3}}}
    stages["dpo"] = dpo | {"start_from": "sft", "noise": {"scheme": "count", "draws": 2}}
    stages["lora"] = dpo | {"start_from": "dpo", "lora": {"rank": 4, "alpha": 4}, "reference": "sft"}
    stages["evaluation"] = raw["stages"]["evaluation"] | {"arms": ["sft", "dpo", "lora"]}
    recipe = Recipe.model_validate(raw | {"stages": stages})
    folder = run_recipe(recipe, lambda line: None)
    first, second = MetricsFile(folder.stage("dpo") / "metrics.jsonl").read()
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4) and first["dpo/bias_bound"] == pytest.approx(0, abs=1e-9)
    assert second["dpo/bias_bound"] > 0 and not (folder.stage("dpo") / "reference").exists()
    # The second stage starts from dpo and is held against sft, so it does not begin at log 2.
    (start, _) = MetricsFile(folder.stage("lora") / "metrics.jsonl").read()
    assert start["dpo/margin"] != pytest.approx(0, abs=1e-6)
