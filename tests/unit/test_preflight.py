"""What cannot be done is said before the first stage."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe, validate_recipe
from rlmm.preflight import check_stages
from tests.families.checkpoints import tiny
from tests.families.masked_checkpoints import tiny as masked

ANSWER = {"sampling": {"answer": {"length_limit": 4}}}
THOUGHT = {"sampling": {"thought": {"length_limit": 4}}}
SERVED = {"engine": {"kind": "vllm_server"}}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM, as far as preflight looks."""
    monkeypatch.setattr("rlmm.preflight.find_spec", lambda name: name)


def recipe(stage: dict[str, Any], family: str = "janus", variant: str = "describe", **policy: Any) -> Recipe:
    step = {
        "kind": "grpo",
        "steps": 1,
        "learning_rate": 1e-3,
        "prompts_per_step": 2,
        "samples_per_prompt": 2,
        "micro_batch_size": 2,
    }
    raw = {
        "name": "a", "data": {"kind": "scenes", "variant": variant}, "policy": tiny(family).model_dump() | policy,
        "rewards": {"terms": [{"name": "exact_match"}]},
        "held_out": {"terms": [{"name": "exact_match", "label": "other"}]}, "stages": {"grpo": step | stage},
    }  # fmt: skip
    return validate_recipe(raw, "a")


def test_servers_are_not_asked_about_what_a_policy_sees() -> None:
    for stage in (ANSWER, THOUGHT):
        with pytest.raises(ValueError, match=r"grpo\.sampling\.(answer|thought): .* set engine\.kind: vllm or torch"):
            check_stages(recipe(stage | SERVED))
        check_stages(recipe(stage | {"engine": {"kind": "vllm"}}))
        check_stages(recipe(stage | SERVED, variant="text_to_image"))
        check_stages(recipe(stage | SERVED, family="emu3"))
    check_stages(recipe(SERVED, variant="edit"))


def test_a_vllm_is_not_asked_for_more_positions_than_the_checkpoint_has() -> None:
    check_stages(recipe({"engine": {"kind": "vllm", "max_length": 512}}))
    for kind in ("vllm", "vllm_server"):
        with pytest.raises(ValueError, match="stage 'grpo': max_length 513 .* the checkpoint's 512 positions"):
            check_stages(recipe({"engine": {"kind": kind, "max_length": 513}}))


def test_a_run_starts_no_servers_that_would_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe({"engine": {"kind": "vllm_server", "replicas": 2, "tensor_parallel": 2}})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_stages(asked)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match="replicas: 2 and tensor_parallel: 2: a run starts its server"):
        check_stages(asked)


def test_a_checkpoint_that_says_nothing_of_pixels_is_not_asked_about_images(tmp_path: Path) -> None:
    folder = tmp_path / "janus"
    shutil.copytree(tiny("janus").path, folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        check_stages(recipe(ANSWER, path=str(folder)))
    check_stages(recipe(ANSWER, path=str(folder), variant="text_to_image"))


def test_a_text_is_not_asked_of_what_writes_none_nor_with_a_stop_that_is_no_token() -> None:
    with pytest.raises(ValueError, match=r"grpo\.sampling\.thought: .*no head for text"):
        check_stages(recipe(THOUGHT, family="glm_image", variant="text_to_image"))
    with pytest.raises(ValueError, match=r"grpo\.sampling\.answer: stop names '<nothing>'"):
        check_stages(recipe({"sampling": {"answer": {"length_limit": 4, "stop": ["<nothing>"]}}}))


@pytest.mark.parametrize("policy", [tiny("llamagen_text"), masked("show_o"), tiny("janus")], ids=lambda one: one.family)
def test_text_is_not_taught_where_nothing_learns_it(policy: CheckpointPolicy) -> None:
    made = recipe({}, variant="text_to_image").model_dump(mode="json") | {"policy": policy.model_dump()}
    made["stages"] = {"sft": {"kind": "sft", "steps": 1, "learning_rate": 1e-3, "text_weight": 0.5}}
    if policy.family == "janus":
        check_stages(validate_recipe(made, "a"))
        return
    with pytest.raises(ValueError, match=r"text_weight 0\.5: checkpoints of family .* set it to 0"):
        check_stages(validate_recipe(made, "a"))


def test_vllm_in_the_process_is_for_one_and_each_process_has_a_server() -> None:
    inside = recipe({"engine": {"kind": "vllm"}}, variant="edit")
    check_stages(inside)
    with pytest.raises(ValueError, match=r"'grpo': engine\.kind vllm .* this run has 2"):
        check_stages(inside, 2)
    served = recipe({"engine": {"kind": "vllm_server", "urls": ["http://127.0.0.1:1"]}}, variant="edit")
    check_stages(served)
    with pytest.raises(ValueError, match=r"2 training processes and 1 rollout server"):
        check_stages(served, 2)
    check_stages(recipe(SERVED, variant="edit"), 2)


def test_vllm_that_is_not_installed_is_missed_before_the_first_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlmm.preflight.find_spec", lambda name: None)
    for engine in ({"kind": "vllm"}, {"kind": "vllm_server"}):
        with pytest.raises(
            ValueError, match=r"'grpo': .*not installed; install the extra `cpu` .* engine\.kind: torch"
        ):
            check_stages(recipe({"engine": engine}, variant="edit"))
    check_stages(recipe({"engine": {"kind": "vllm_server", "urls": ["http://127.0.0.1:1"]}}, variant="edit"))
    check_stages(recipe({}, variant="edit"))
