"""The tiny recipe of a masked policy, run whole: what it leaves, and that cutting a step changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlmm.config.engines import RolloutServerConfig, TorchEngineConfig
from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe, RecipeError, read_recipe, validate_recipe
from rlmm.config.sampling import Sampling
from rlmm.config.stages import GrpoStage
from rlmm.pipeline import run_recipe
from rlmm.policies.families.loading import load_policy
from rlmm.policies.masked import MaskedPolicy
from rlmm.rollout_server import server_plan
from rlmm.run_folder import RunFolder
from rlmm.sampling import draw_samples
from rlmm.train.engines import build_engine
from rlmm.train.metrics import MetricsFile
from rollouts.assembly import one_image_span
from rollouts.law import Law
from rollouts.store import read_trajectory
from rollouts.torch_engine.masked import MaskedTorchEngine
from rollouts.trajectory import Span
from rollouts.unmasking import Unmasking

TINY = Path(__file__).parents[1] / "recipes" / "tiny_masked.yaml"
COUNT = "stages.grpo.estimator={kind: count}"
CONFIDENT = "stages.grpo.sampling.unmasking={steps: 3, order: confidence}"
NO_KL = "stages.grpo.objective.kl.coefficient=0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_recipe(read_recipe(TINY, [f"run_dir={tmp_path_factory.mktemp('masked') / 'run'}"]), lambda _: None)


@pytest.fixture
def variant(run: RunFolder, tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes of the GRPO stage alone, from the run's SFT."""

    def make(*overrides: str, name: str = "run") -> Recipe:
        start = CheckpointPolicy(path=str(run.stage("sft") / "model"))
        recipe = read_recipe(TINY, [f"run_dir={tmp_path / name}", *overrides])
        return recipe.model_copy(update={"policy": start, "stages": {"grpo": recipe.stages["grpo"]}})

    return make


def metrics(folder: RunFolder) -> list[dict[str, float]]:
    return MetricsFile(folder.stage("grpo") / "metrics.jsonl").read()


def test_every_stage_ends_and_trainer_and_sampler_agree(run: RunFolder) -> None:
    assert (run.path / "report.html").is_file() and (run.path / "adapter" / "adapter_config.json").is_file()
    rows = metrics(run)
    assert len(rows) == 6 and all(row["mismatch/max"] < 1e-5 for row in rows if "mismatch/max" in row)
    assert sum("mismatch/max" in row for row in rows) == 3
    kept = json.loads(next(run.path.glob("stages/*/eval.json")).read_text())
    assert {cell["arm"] for cell in kept["rows"]} == {"sft", "grpo"}


def test_rollouts_keep_the_order_they_were_revealed_in(run: RunFolder) -> None:
    made, _ = read_trajectory(sorted((run.stage("grpo") / "rollouts").glob("*.parquet"))[-1])
    unmasking = made.spans[0].unmasking
    assert unmasking is not None and unmasking.steps == 3
    assert made.step.max() == 2 and all(len(row.unique()) == 3 for row in made.step)
    policy = load_policy(run.stage("sft") / "model")
    assert isinstance(policy, MaskedPolicy) and not (made.ids == policy.mask).any()


def test_exports_are_bidirectional_in_plain_transformers(run: RunFolder) -> None:
    policy = load_policy(run.path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(run.path / "merged")
    ids = torch.tensor([[*policy.layout.prefix([9, 10]), *range(policy.layout.image[0], policy.layout.image[0] + 12)]])
    with torch.no_grad():
        hidden = policy.hidden(ids, torch.ones_like(ids, dtype=torch.bool))
        wanted = policy.head(hidden[0], policy.layout.image)
        found = plain(ids).logits[0, :, slice(*policy.layout.image)]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_sampling_takes_steps_and_order(run: RunFolder, tmp_path: Path) -> None:
    folder = run.path / "merged"
    source = CheckpointPolicy(path=str(folder))
    for unmasking in (None, {"steps": 4, "order": "ancestral"}, {"steps": 12, "order": "confidence"}):
        sampling = Sampling.model_validate({"unmasking": unmasking})
        one, same = (draw_samples(source, ["a"], 2, sampling).grid() for _ in "ab")
        assert one.tobytes() == same.tobytes()
    with pytest.raises(ValueError, match="at most 12"):
        draw_samples(source, ["a"], 1, Sampling.model_validate({"unmasking": {"steps": 13, "order": "random"}}))


def test_a_policy_whose_prompts_see_themselves_alone_runs_whole(tmp_path: Path) -> None:
    recipe = read_recipe(TINY, ["policy.prompt_attention=causal", f"run_dir={tmp_path / 'run'}"])
    folder = run_recipe(recipe, lambda _: None)
    found = [row["mismatch/max"] for row in metrics(folder) if "mismatch/max" in row]
    assert len(found) == 3 and max(found) < 1e-5
    policy = load_policy(folder.path / "merged")
    assert policy.layout.causal_prompt and isinstance(build_engine(TorchEngineConfig(), policy), MaskedTorchEngine)
    prefix, low = policy.layout.prefix([9, 10]), policy.layout.image[0]
    ids = torch.tensor([[*prefix, *range(low, low + 12)]])
    seen = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    seen[:, :, : len(prefix)] = seen[:, :, : len(prefix)].tril()
    with torch.no_grad():
        hidden = policy.hidden(ids, torch.ones_like(ids, dtype=torch.bool))
        plain = AutoModelForCausalLM.from_pretrained(folder.path / "merged")
        wanted = plain(ids, attention_mask=seen).logits[0, :, slice(*policy.layout.image)]
    torch.testing.assert_close(policy.head(hidden[0], policy.layout.image), wanted, rtol=0, atol=1e-5)


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.stage("grpo") / "model" / "model.safetensors")


SANDWICH = "{kind: stratified, draws: 2, upper: {share: 0.5}}"


PLAIN, *OTHERS = [
    [],
    [f"stages.grpo.estimator={SANDWICH}", "stages.grpo.objective={name: reinforce, updates_per_rollout: 2}"],
    ["stages.grpo.estimator={kind: trajectory, steps: 2}"],
    [CONFIDENT, NO_KL],
    [CONFIDENT, "stages.grpo.estimator={steps: 2, order_term: false}"],
    [
        "stages.grpo.estimator={kind: stratified, draws: 3}",
        "stages.grpo.objective={name: gspo, clip_low: 0.2, clip_high: 0.2, updates_per_rollout: 2}",
    ],
]


@pytest.mark.parametrize("settings", [PLAIN, *(pytest.param(one, marks=pytest.mark.long) for one in OTHERS)])
def test_the_micro_batch_size_does_not_change_the_update(variant: Callable[..., Recipe], settings: list[str]) -> None:
    made = [
        run_recipe(variant(*settings, f"stages.grpo.micro_batch_size={size}", name=str(size)), lambda _: None)
        for size in (1, 4)
    ]
    one, other = (weights(folder) for folder in made)
    start = load_file(Path(variant().policy.path) / "model.safetensors")  # pyrefly: ignore
    moved = max(float((one[name] - start[name]).abs().max()) for name in start)
    apart = max(float((one[name] - other[name]).abs().max()) for name in start)
    assert moved > 1e-4 and apart < 0.01 * moved
    assert all(row["mismatch/max"] < 1e-5 for folder in made for row in metrics(folder) if "mismatch/max" in row)


def test_bfloat16_stays_within_its_gate_and_really_rounds(variant: Callable[..., Recipe]) -> None:
    first = {}
    for precision in ("float32", "bfloat16"):
        asked = ("stages.grpo.steps=2", f"stages.grpo.precision={precision}")
        first[precision] = metrics(run_recipe(variant(*asked, name=precision), lambda _: None))[0]
    assert first["bfloat16"]["mismatch/mean"] < 0.02
    assert first["bfloat16"]["grad_norm"] != pytest.approx(first["float32"]["grad_norm"], rel=1e-4)


def test_the_log_says_how_good_an_estimate_is(variant: Callable[..., Recipe]) -> None:
    settings = "stages.grpo.estimator={kind: stratified, draws: 4}", "stages.grpo.objective={name: gspo, clip_low: 0.2}"
    (first, *_) = metrics(run_recipe(variant(*settings), lambda _: None))
    quarters = [first[f"noise/masked_q{q}"] for q in range(1, 5)]
    assert quarters == pytest.approx([0.25] * 4, abs=1e-6)  # one draw in each quarter of 12 counts
    assert 0 < first["noise/deviation"] < 20
    (first, *_) = metrics(run_recipe(variant(CONFIDENT, NO_KL, name="order"), lambda _: None))
    assert 0 < first["order/share"] < 1


def test_a_bound_is_held_near_the_references_by_independent_draws(variant: Callable[..., Recipe]) -> None:
    objective = "{name: gspo, clip_low: 0.2, updates_per_rollout: 2, kl: {kind: k2, coefficient: 0.5}}"
    settings = f"stages.grpo.objective={objective}", "stages.grpo.estimator={kind: count, draws: 3}"
    said: list[str] = []
    rows = metrics(run_recipe(variant(*settings), said.append))
    assert not any("warning" in line for line in said)
    assert rows[0]["kl"] == 0.0 and all(row["kl"] != 0.0 for row in rows[1:])  # the reference is the start


def test_a_baseline_that_is_no_likelihood_runs_when_forced_and_says_so(variant: Callable[..., Recipe]) -> None:
    said: list[str] = []
    estimator = "stages.grpo.estimator={kind: count, draws: 2, force: true}"
    run_recipe(variant(estimator, "stages.grpo.objective={name: grpo}"), said.append)
    assert any("warning: token_ratio on a log-prob of kind elbo" in line for line in said)
    said.clear()
    run_recipe(
        variant("stages.grpo.estimator={kind: mean_field}", "stages.grpo.objective={name: grpo}", name="m"), said.append
    )
    assert any("no likelihood" in line for line in said)


@pytest.mark.parametrize("estimator", ["{order_term: false}", "{kind: mean_field}"])
def test_a_kl_of_the_tokens_alone_is_read_with_a_confident_order(estimator: str) -> None:
    (stage,) = [
        stage
        for stage in read_recipe(TINY, [CONFIDENT, f"stages.grpo.estimator={estimator}"]).stages.values()
        if isinstance(stage, GrpoStage)
    ]
    assert stage.objective.kl.coefficient > 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ([COUNT], "stage 'grpo': token_ratio .* use level: sequence.* estimator.force: true"),
        (
            ["stages.grpo.estimator={kind: count}", "stages.grpo.objective={name: gspo, kl: {coefficient: 0.1}}"],
            "which takes the bias out",
        ),
        (
            [
                "stages.grpo.estimator={kind: count, draws: 1}",
                "stages.grpo.objective={name: gspo, kl: {kind: k2, coefficient: 0.1}}",
            ],
            "two or more",
        ),
        (
            [
                "stages.grpo.estimator={kind: stratified, draws: 4}",
                "stages.grpo.objective={name: gspo, kl: {kind: k2, coefficient: 0.1}}",
            ],
            "draws that are independent",
        ),
        ([f"stages.grpo.estimator={SANDWICH}", "stages.grpo.objective={name: gspo}"], "an upper estimate has no ratio"),
        (["stages.grpo.estimator={kind: complement, draws: 3}"], "2 at a time"),
        (["stages.grpo.estimator={kind: trajectory, draws: 2}"], "leave the other one out"),
        (["stages.grpo.estimator={kind: truncated}"], "ratios belong to kind truncated"),
        (["stages.grpo.sampling.unmasking=null"], "sampling.unmasking: a masked policy needs it"),
        (["stages.evaluation.unmasking=null"], "evaluation.unmasking: a masked policy needs it"),
        (["stages.grpo.sampling.unmasking={steps: 3, order: noisy_confidence, noise: 1}"], "no known log-prob"),
        (["stages.grpo.sampling.unmasking={steps: 3, order: confidence}", "stages.grpo.sampling.top_k=5"], "supports"),
        (
            [
                "stages.grpo.sampling.unmasking={steps: 3, order: confidence}",
                "stages.grpo.sampling.guidance_scale=2.0",
                "stages.grpo.sampling.guidance=conditional_only",
                "stages.grpo.gates.off_policy=allow",
            ],
            "whose order that is not",
        ),
        ([CONFIDENT], "a KL to it is infinite"),
        (["stages.grpo.sampling.unmasking.steps=500"], "at most 12"),
        (["stages.evaluation.unmasking={steps: 500}"], "at most 12"),
        (["stages.grpo.sampling.unmasking={steps: 1, order: blocks, block: 8}"], "between 2 and 12"),
        (["stages.grpo.estimator={kind: trajectory, force: true}"], "force does nothing"),
        (["stages.grpo.estimator={steps: 1}", "stages.grpo.objective={name: gspo}"], "needs every decision"),
        (["stages.grpo.estimator={order_term: false}"], "no order's term to leave out"),
        (["stages.grpo.estimator={kind: count, order_term: false}"], "a noise scheme has no order's log-prob"),
        (["stages.grpo.estimator={steps: 3}"], "3 of the 3 steps an image is revealed in are all of them"),
        (["stages.grpo.estimator={kind: count, upper: {share: 0.5}}"], "give draws >= 2"),
        (["stages.grpo.objective={name: reinforce, clip_low: 0.01}"], "reinforce has no ratio"),
        (
            [
                "stages.grpo.estimator={kind: count}",
                "stages.grpo.objective={name: gspo, token_weighting: 'weights.py:mine'}",
            ],
            "only a row's sum means something",
        ),
        (
            [
                "understanding={data: {kind: scenes, variant: describe}, answer: {length_limit: 4}, "
                "rewards: {terms: [{name: exact_match}]}}"
            ],
            "an eval stage asks it `understanding`",
        ),
        (["stages.grpo.engine={kind: vllm}"], "sampled by engine.kind torch"),
        (["policy.family=next_token"], "noise is of masked policies"),
        (["policy.family=next_token", "stages.sft.noise=null"], "decides one token after the other"),
        (["policy.null=token"], "not sampled by vLLM"),
        (["stages.sft.micro_batch_size=1"], "micro_batch_size"),
    ],
)
def test_what_a_family_cannot_do_is_refused_when_the_recipe_is_read(settings: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        read_recipe(TINY, settings)


def test_left_to_right_engines_refuse_a_masked_policy(run: RunFolder) -> None:
    path = run.stage("sft") / "model"
    with pytest.raises(ValueError, match="is a masked policy"):
        server_plan(path, "127.0.0.1", RolloutServerConfig())
    span = Span("image", Law((0, 4)), 12, unmasking=Unmasking(3))
    with pytest.raises(ValueError, match="the span has an unmasking"):
        one_image_span([span], "torch")


def test_figures_are_of_the_decisions_that_were_evaluated(variant: Callable[..., Recipe]) -> None:
    plain = "stages.grpo.objective={name: grpo}"
    whole = metrics(run_recipe(variant(plain, name="whole"), lambda _: None))[0]["entropy"]
    part = variant(plain, "stages.grpo.estimator={steps: 1}", name="part")
    assert metrics(run_recipe(part, lambda _: None))[0]["entropy"] == pytest.approx(whole, rel=0.05)


def test_a_checkpoint_says_its_family(run: RunFolder) -> None:
    checkpoint = {"kind": "checkpoint", "path": str(run.stage("sft") / "model")}
    raw = yaml.safe_load(TINY.read_text()) | {"policy": checkpoint, "codec": None}
    grpo = raw["stages"]["grpo"]
    raw["stages"] = {"grpo": grpo | {"sampling": {}}}
    with pytest.raises(RecipeError, match="a masked policy needs it"):
        validate_recipe(raw, "a recipe")
    raw["stages"] = {"grpo": grpo}
    validate_recipe(raw, "a recipe")
