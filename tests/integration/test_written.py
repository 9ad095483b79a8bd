"""Recipes in which the policy writes: a thought before its image, answers about images, and what it understands."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import RecipeError, read_recipe, validate_recipe
from rlmm.config.sampling import Sampling
from rlmm.pipeline import run_recipe
from rlmm.run_folder import RunFolder
from rlmm.sampling import draw_samples, read_image
from rlmm.train.experience import restore
from rlmm.train.metrics import MetricsFile
from rollouts.store import read_trajectory

TINY = Path(__file__).parents[1] / "recipes" / "tiny_thought.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_recipe(read_recipe(TINY, [f"run_dir={tmp_path_factory.mktemp('thought') / 'run'}"]), lambda _: None)


def test_trainer_and_sampler_agree_on_texts_and_images(run: RunFolder) -> None:
    rows = MetricsFile(run.stage("grpo") / "metrics.jsonl").read()
    assert [row["mismatch/max"] < 1e-5 for row in rows if "mismatch/max" in row] == [True, True]
    made, columns = read_trajectory(sorted((run.stage("grpo") / "rollouts").glob("*.parquet"))[-1])
    assert [span.kind for span in made.spans] == ["text", "image"] and made.spans[0].advantage_weight == 0.5
    assert len(set(columns["text"])) > 1 and all(image.startswith(b"\x89PNG") for image in columns["image"])
    lengths = (made.target_mask & (made.span == 0)).sum(1)
    assert rows[-2]["text/tokens"] == pytest.approx(float(lengths.float().mean()))
    assert 0 <= rows[-2]["text/cut_share"] <= 1


def test_what_the_arms_understand_is_in_the_evaluation_and_on_the_page(run: RunFolder) -> None:
    found = json.loads((run.stage("evaluation") / "eval.json").read_text())["understanding"]
    assert {(row["arm"], row["metric"]) for row in found} == {
        (arm, metric) for arm in ("sft", "grpo") for metric in ("exact_match", "wer")
    }
    assert all(row["n"] == 4 and 0 <= row["mean"] <= 1 for row in found)
    answers = pq.read_table(run.stage("evaluation") / "answers.parquet").to_pylist()
    assert len(answers) == 8 and all(row["source"].startswith(b"\x89PNG") and row["reference"] for row in answers)
    page = (run.path / "report.html").read_text()
    assert "What the arms understand" in page and answers[0]["reference"] in page


def test_images_are_tokenised_once(run: RunFolder) -> None:
    """SFT, its understanding and the evaluation's questions share what is kept."""
    (folder,) = (run.path / "tokens").iterdir()
    kept = [row for file in folder.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len({row["image"] for row in kept}) == len(kept) and {len(row["codes"]) for row in kept} == {16}


def test_grpo_on_answers_learns_what_is_rewarded(run: RunFolder, tmp_path: Path) -> None:
    overrides = [
        f"run_dir={tmp_path / 'answers'}",
        "data={kind: scenes, variant: describe, train_images: 16, held_out: 8}",
        "rewards={terms: [{function: 'tests/recipes/rewards.py:letters'}]}",
        "held_out={terms: [{name: wer}]}",
        "stages.grpo.sampling={answer: {length_limit: 8}}",
        "stages.grpo.steps=16",
        "stages.grpo.prompts_per_step=4",
        "stages.grpo.samples_per_prompt=8",
        "stages.grpo.micro_batch_size=16",
        "stages.grpo.learning_rate=1.0e-2",
        "stages.grpo.objective={name: grpo}",
    ]
    recipe = read_recipe(TINY, overrides)
    start = CheckpointPolicy(path=str(run.stage("sft") / "model"))
    recipe = recipe.model_copy(update={"policy": start, "stages": {"grpo": recipe.stages["grpo"]}})
    rows = MetricsFile(run_recipe(recipe, lambda _: None).stage("grpo") / "metrics.jsonl").read()
    rewards = [row["reward/mean"] for row in rows]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2
    assert all(row["mismatch/max"] < 1e-5 for row in rows)


def test_thought_and_image_each_learn_from_their_own_terms(run: RunFolder, tmp_path: Path) -> None:
    terms = [
        "{function: 'tests/recipes/rewards.py:halves', span: image, steps: true}",
        "{function: 'tests/recipes/rewards.py:thought_length', span: text}",
    ]
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        f"rewards={{terms: [{', '.join(terms)}]}}",
        "stages.grpo.objective={name: grpo, updates_per_rollout: 2}",
        "stages.grpo.steps=2",
    ]
    recipe = read_recipe(TINY, overrides)
    start = CheckpointPolicy(path=str(run.stage("sft") / "model"))
    recipe = recipe.model_copy(update={"policy": start, "stages": {"grpo": recipe.stages["grpo"]}})
    folder = run_recipe(recipe, lambda _: None)
    (file,) = (folder.stage("grpo") / "rollouts").glob("*.parquet")
    made, columns = read_trajectory(file)
    advantage = np.stack(columns["token_advantage"])
    assert restore(file).advantage.numpy().tolist() == advantage.astype(np.float32).tolist(), "what a resumed run reads"
    text, image = (((made.span == at) & made.target_mask).numpy() for at in (0, 1))
    assert not advantage[~(text | image)].any()
    for rows in (slice(0, 4), slice(4, 8)):
        lengths = np.array([len(one) for one in columns["text"][rows]], float)
        wanted = (lengths - lengths.mean()) / lengths.std(ddof=1) if lengths.std() else np.zeros(4)
        for at, value in zip(range(rows.start, rows.stop), wanted, strict=True):
            np.testing.assert_allclose(advantage[at][text[at]], value, atol=1e-5)
        pictures = [np.asarray(Image.open(BytesIO(png)), float) for png in columns["image"][rows]]
        darkness = np.array([[1 - half.mean() / 255 for half in np.split(one, 2)] for one in pictures])
        upper, lower = ((darkness - darkness.mean()) / darkness.std(ddof=1)).T
        for at, first, last in zip(range(rows.start, rows.stop), upper + lower, lower, strict=True):
            drawn = advantage[at][image[at]]
            np.testing.assert_allclose(drawn[: len(drawn) // 2], first, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(drawn[len(drawn) // 2 :], last, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_answers_about_a_picture_and_edits_one(run: RunFolder, tmp_path: Path) -> None:
    model, picture = str(run.stage("grpo") / "model"), tmp_path / "in.png"
    Image.linear_gradient("L").convert("RGB").save(picture)
    out = tmp_path / "out.png"
    common = [sys.executable, "-m", "rlmm.cli", "sample", model, "what is shown?", "--samples", "2", "--out", str(out)]
    answers = ["--source", str(picture), "--sampling", "answer={length_limit: 5}"]
    done = subprocess.run([*common, *answers], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("what is shown?: ") == 2 and not out.exists()
    thought = Sampling.model_validate({"guidance_scale": 2.0, "thought": {"length_limit": 5}})
    made = draw_samples(CheckpointPolicy(path=model), ["a"], 2, thought, sources=[read_image(picture)])
    assert made.grid().size == (2 * 52 + 4, 56) and len(made.texts) == 2
    bare = draw_samples(CheckpointPolicy(path=model), ["a"], 2, thought)
    assert bare.texts != made.texts, "the source must matter"
    with pytest.raises(ValueError, match="is no readable picture"):
        read_image(Path(__file__))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.grpo.sampling={answer: {length_limit: 4}, guidance_scale: 2.0}", "guidance_scale is of images"),
        ("stages.grpo.sampling={answer: {length_limit: 4}, thought: {length_limit: 4}}", "give one of them"),
        ("stages.grpo.sampling.thought.template=think", "must hold {prompt} once"),
        ("understanding=null", "give the recipe one"),
        ("policy.family=masked", "draws images alone"),
        (
            "rewards={terms: [{name: edge_density, span: text, steps: true}], mode: product}",
            "is a part of a sum, and mode is product",
        ),
        ("rewards={terms: [{name: edge_density, steps: true, transform: rank}]}", "steps have no parts"),
        ("held_out={terms: [{name: edge_density, span: image}]}", "a held-out one trains nothing"),
    ],
)
def test_what_does_not_fit_together_is_refused(override: str, message: str) -> None:
    extra = [] if "masked" not in override else ["stages.grpo.sampling.unmasking={steps: 4, order: random}"]
    with pytest.raises(RecipeError, match=message):
        read_recipe(TINY, [override, *extra])


def test_a_stop_that_is_no_token_is_told_with_the_nearest(run: RunFolder, tmp_path: Path) -> None:
    recipe = read_recipe(TINY, [f"run_dir={tmp_path / 'run'}", "stages.grpo.sampling.thought.stop=[<eso>]"])
    start = CheckpointPolicy(path=str(run.stage("sft") / "model"))
    recipe = recipe.model_copy(update={"policy": start, "stages": {"grpo": recipe.stages["grpo"]}})
    with pytest.raises(ValueError, match="'<eso>', which is no token. Nearest: <eos>"):
        run_recipe(recipe, lambda _: None)


def test_a_run_is_resumed_with_the_recipe_it_wrote(run: RunFolder) -> None:
    """A resolved recipe, which names every default, is a valid one."""
    validate_recipe(yaml.safe_load((run.path / "config.yaml").read_text()), "config.yaml")


@pytest.mark.parametrize(
    ("term", "override", "message"),
    [
        ("span: text", "stages.grpo.sampling={guidance_scale: 1.5}", "this stage writes no text"),
        ("span: image", "stages.grpo.sampling={answer: {length_limit: 4}}", "no image is drawn"),
        ("span: text", "stages.grpo.objective={name: gspo}", "one advantage a row"),
        ("span: text", "stages.grpo.resample_flat=1", "set it to 0"),
        ("span: image", "stages.grpo.objective={name: grpo, token_weighting: 'a.py:b'}", "told one advantage a row"),
        ("steps: true", "stages.grpo.objective={name: rloo}", "baseline mean"),
    ],
)
def test_what_no_token_can_earn_is_refused(term: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(TINY, [f"rewards={{terms: [{{name: edge_density, {term}}}]}}", override])
