"""Pairs of pictures and of answers about the same rows, learned from together; and a policy that is its own judge."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rlmm.config.engines import TorchEngineConfig
from rlmm.config.recipe import RecipeError, read_recipe
from rlmm.config.sampling import Writing
from rlmm.data import build_dataset
from rlmm.pipeline import run_recipe
from rlmm.policies.families.loading import load_policy
from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.policies.responses import stop_tokens, writing_spelling
from rlmm.train.context import StageContext, image_tokens, run_codec
from rlmm.train.engines import build_engine
from rlmm.train.experience import spell_sources
from rlmm.train.metrics import MetricsFile
from rlmm.train.pairs import run_pairs
from tests.integration.conftest import TinyRun

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_pair_dpo.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    recipe = read_recipe(RECIPE, [f"run_dir={tmp_path_factory.mktemp('pair') / 'run'}"])
    said: list[str] = []
    return TinyRun(recipe, run_recipe(recipe, said.append), said)


def pairs(run: TinyRun, stage: str) -> list[dict[str, Any]]:
    return pq.read_table(run.folder.stage(stage) / "pairs.parquet").to_pylist()


def test_both_pairs_are_of_one_row(run: TinyRun) -> None:
    data = build_dataset(run.recipe.data, "train", run.recipe.seed)
    pictures = {example.target.tobytes(): example.prompt for example in data if example.target is not None}
    rows = pairs(run, "pairs")
    assert rows
    for row in rows:
        shown = Image.open(io.BytesIO(row["picture"]["bytes"]))
        assert pictures[shown.tobytes()] == row["prompt"] and row["question"] == "what is shown"
        assert row["chosen_answer_score"] > row["rejected_answer_score"]
        assert row["chosen_answer"] != row["rejected_answer"] and row["chosen_codes"] != row["rejected_codes"]


def test_scores_and_margins_of_either_kind_are_told_apart(run: TinyRun) -> None:
    folder = run.folder.stage("pairs")
    for place, row in enumerate(MetricsFile(folder / "metrics.jsonl").read()):
        for kind, name in (("rollouts", "score/mean"), ("answers", "score/understanding/mean")):
            drawn = pq.read_table(folder / kind / f"step-{place:06d}.parquet")["reward"].to_pylist()
            assert row[name] == pytest.approx(sum(drawn) / len(drawn))
    record, rows = json.loads((folder / "margins.json").read_text()), pairs(run, "pairs")
    assert sum(record["answers"]["histogram"]["counts"]) == len(rows)
    most = max(row["chosen_answer_score"] - row["rejected_answer_score"] for row in rows)
    assert record["answers"]["margin"]["most"] == pytest.approx(most)


def test_the_loss_has_either_kind_with_its_weight(run: TinyRun) -> None:
    """At the reference every pair's loss is log 2."""
    (first, _) = MetricsFile(run.folder.stage("dpo") / "metrics.jsonl").read()
    assert first["loss"] == pytest.approx((2.0 + 0.5) * 0.6931471805599453, abs=1e-5)
    assert {"dpo/correct", "dpo/understanding/correct", "dpo/margin", "dpo/understanding/margin"} <= first.keys()


def test_answers_are_read_after_the_picture_and_the_question_as_it_was_asked(run: TinyRun) -> None:
    """By hand: the stored reference of the first row's answers."""
    policy = load_policy(run.folder.stage("sft") / "model")
    context = StageContext(run.recipe, run.folder, "dpo", run.recipe.stages["dpo"], print)
    codec = run_codec(context)
    codec.eval()
    row, writing = pairs(run, "pairs")[0], Writing(template="say: {prompt}")
    source = Image.open(io.BytesIO(row["picture"]["bytes"]))
    sources = spell_sources(image_tokens(context, codec, policy), policy.spelling, [source])
    asked = writing_spelling(policy.spelling, writing, 1, False).encode(row["question"])
    stored = load_file(run.folder.stage("dpo") / "reference" / "000000.safetensors")["log_probs"]
    for side, answer in enumerate((row["chosen_answer"], row["rejected_answer"])):
        text = [*policy.encode_prompt(answer), stop_tokens(policy.spelling, Writing(stop=("<eos>",)))[0]]
        batch = supervised_batch(policy.layout, [Supervised(asked, sources=sources, text=text)])
        with torch.no_grad():
            wanted = float(policy.sequence_log_probs(batch)[batch.target_BT].sum())
        assert float(stored[1, side]) == pytest.approx(wanted, abs=1e-4)


def test_a_policys_own_answers_are_scores(run: TinyRun) -> None:
    rows = pairs(run, "self_play")
    assert len(rows) == 4 and all(row["margin"] > 0 and row["question"] is None for row in rows)
    table = pq.read_table(run.folder.stage("self_play") / "rollouts" / "step-000000.parquet")
    assert {"reward/wer", "reward/brevity"} <= set(table.column_names)
    assert "darkness" not in " ".join(table.column_names)


def test_the_stages_own_engine_draws_and_answers(run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []

    def counted(config: Any, *rest: Any) -> Any:
        built.append(config)
        return build_engine(config, *rest)

    monkeypatch.setattr("rlmm.train.pair_samples.build_engine", counted)
    config = run.recipe.stages["self_play"].model_copy(update={"engine": TorchEngineConfig(max_rows=6)})
    run_pairs(StageContext(run.recipe, run.folder, "self_play", config, print, tmp_path / "again"))
    assert built == [TorchEngineConfig(max_rows=6)]
    again = pq.read_table(tmp_path / "again" / "pairs.parquet").to_pylist()
    assert [row["chosen_id"] for row in again] == [row["chosen_id"] for row in pairs(run, "self_play")]


def test_an_engine_with_other_weights_draws_nothing(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*built_for: Any) -> Any:
        engine: Any = build_engine(*built_for)
        engine.fingerprint = lambda: "another"
        engine.close = lambda: closed.append(engine)
        return engine

    closed: list[Any] = []

    monkeypatch.setattr("rlmm.train.pair_samples.build_engine", other)
    context = StageContext(run.recipe, run.folder, "self_play", run.recipe.stages["self_play"], print, tmp_path)
    with pytest.raises(RuntimeError, match=r"the engine's weights \(another\) are not the trainer's"):
        run_pairs(context)
    assert not list(tmp_path.rglob("*.parquet")) and len(closed) == 1


def test_what_does_not_fit_is_refused() -> None:
    for override, message in (
        ("stages.pairs.split=prompts", "asks about a row's picture, and split prompts has none"),
        ("stages.dpo.loss=kto", "not with loss kto"),
        ("stages.again.generation_weight=2.0", "there is no understanding"),
        ("policy.family=masked", "a masked policy"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_recipe(RECIPE, [override])
