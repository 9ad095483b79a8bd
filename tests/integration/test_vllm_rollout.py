"""vLLM behind the Engine contract: the trainer's law, the torch engine's tokens, and no stale weights."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlmm.train.gates import TOLERANCE
from rollouts.contract import Grid, Layout
from rollouts.kernels.building import NoKernels
from rollouts.kernels.native import load_kernels
from rollouts.vllm_engine import plugin
from rollouts.vllm_engine.local import LocalHost
from tests.integration.programs import answer_of
from tests.integration.vllm_requests import check_writing

SIZES = {"max_length": 16, "dtype": "float32", "max_rows": 4, "max_prompt_tokens": 16, "kv_bytes": 1 << 20}
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def _compiled() -> bool:
    if torch.cuda.is_available():
        return False
    try:
        return bool(load_kernels())
    except NoKernels:
        return False


needs_kernels = pytest.mark.skipif(not _compiled(), reason="a GPU, or no C++ compiler")


@pytest.fixture(scope="module", params=["eager", pytest.param("compiled", marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    return answer_of("vllm_program.py", f"--{request.param}", timeout=600) | {"mode": request.param}


@needs_vllm
@pytest.mark.slow
def test_the_model_is_compiled_where_that_is_asked_for(found: dict[str, Any]) -> None:
    assert (found["compiled models"] > 0) == (found["mode"] == "compiled")


@needs_vllm
@needs_kernels
@pytest.mark.slow
def test_steps_go_through_the_compiled_kernels(found: dict[str, Any]) -> None:
    assert found["parts"] == ["KernelGate", "KernelImpl", "KernelNorm"]
    assert found["kernel steps"] > 100


WITHOUT = """
from vllm.model_executor.custom_op import op_registry_oot
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from rollouts.vllm_engine.cpu_kernels import use_kernels
use_kernels()
print(AttentionBackendEnum.CPU_ATTN.get_path(), sorted(op_registry_oot))
"""
TWO_STREAMS = "import json; from tests.integration.vllm_program import two_streams; print(json.dumps(two_streams()))"


@needs_vllm
@pytest.mark.long
def test_without_a_compiler_vllm_keeps_its_own(tmp_path: Path) -> None:
    around = os.environ | {"CXX": "/no/compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=around, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend []"], done.stderr
    done = subprocess.run([sys.executable, "-c", TWO_STREAMS], env=around, capture_output=True, text=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["streams"] == 2 and facts["agrees"] == [True, False, True]
    assert all(one["gap"] < 1e-4 and one["same tokens"] for one in facts["laws"].values()), facts


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("law", ["plain", "tempered", "top-k", "top-p", "guided", "two scales, cut"])
def test_trainer_and_torch_engine_agree(found: dict[str, Any], law: str) -> None:
    facts = found["laws"][law]
    assert facts.pop("gap") < 1e-4
    assert all(facts.values()), facts


@needs_vllm
@pytest.mark.slow
def test_two_streams_in_one_request_are_the_same_samples(found: dict[str, Any]) -> None:
    """Under every law: two scales and other nulls fall back to a request a stream."""
    facts = found["two streams"]
    assert facts["streams"] == 2 and facts["agrees"] == [True, False, True]
    for law, one in facts["laws"].items():
        assert one.pop("gap") < 1e-4, law
        assert all(one.values()), (law, one)


@needs_vllm
@pytest.mark.slow
def test_what_is_collected_is_forgotten_and_what_runs_is_not(found: dict[str, Any]) -> None:
    facts = dict(found["by hand"]["shared"])
    assert facts.pop("unknown").startswith("nothing is known of 1 of 1 samples, among them a")
    assert facts == {"drawn": [True, True], "known": ["b"], "untouched": True}


@needs_vllm
@pytest.mark.slow
def test_rows_that_are_apart_are_left_alone_and_noted_and_rows_that_move_are_followed(found: dict[str, Any]) -> None:
    facts = {name: fact for name, fact in found["by hand"].items() if name != "shared"}
    assert facts.pop("gap") < 1e-6
    assert all(gap < 2e-6 for gap in facts.pop("pages").values())
    assert facts == {
        "together": True, "apart": "its streams parted: at positions [0, 1]", "left alone": True, "undrawn": -1,
        "moved": True,
    }  # fmt: skip


@needs_vllm
@pytest.mark.slow
def test_a_text_and_its_image_are_the_torch_engines(found: dict[str, Any]) -> None:
    check_writing(found["writing"])


@needs_vllm
@pytest.mark.slow
def test_a_sync_reaches_the_weights_that_run(found: dict[str, Any]) -> None:
    syncs = found["syncs"]
    assert syncs["at the start"]
    assert syncs["done"]["agrees"] and syncs["done"]["gap"] < 1e-4 and syncs["done"]["version"] == 7
    assert not syncs["later change leaks in"]
    assert syncs["after half"]["agrees"] and syncs["after half"]["gap"] < 1e-4
    assert syncs["broken off"] == "RuntimeError: the trainer is gone"
    assert syncs["after a break"]["agrees"] and syncs["after a break"]["gap"] < 1e-4


@needs_vllm
@pytest.mark.slow
def test_a_skipped_or_half_taken_sync_is_caught(found: dict[str, Any]) -> None:
    skipped = found["syncs"]["skipped"]
    assert not skipped["agrees"] and skipped["gap"] > 0.01 and skipped["version"] == 0
    assert not found["syncs"]["half"]


@needs_vllm
@pytest.mark.slow
def test_tied_embeddings_and_forced_row_ends(found: dict[str, Any]) -> None:
    tied = found["tied"]
    assert tied["agrees"] == [True, False, True]
    assert tied["gap"] < 1e-4
    assert tied["row ends forced"] and tied["silent elsewhere"] and tied["decided"] == [12]


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("two spans", "one span at a time"),
        ("no stream", "the law needs 'uncond'"),
        ("too long", "262 positions and the engine has 256"),
        ("nothing", "no requests"),
        ("parted", "RuntimeError: vLLM did not follow the draws"),
    ],
)
def test_what_cannot_be_sampled_is_an_error(found: dict[str, Any], case: str, says: str) -> None:
    assert says in found["faults"][case]


@needs_vllm
@pytest.mark.slow
def test_a_cache_too_small_for_one_sample_is_an_error_that_names_the_setting(found: dict[str, Any]) -> None:
    assert found["small cache"].startswith("ValueError: vLLM cannot hold one whole sample")
    assert "raise engine.kv_megabytes" in found["small cache"] and "one whole sample" in found["small cache"]
    assert "lower engine.kv_megabytes" in found["large cache"]


@needs_vllm
@pytest.mark.slow
def test_the_engine_goes_on_after_an_error_and_leaves_no_group(found: dict[str, Any]) -> None:
    assert found["faults"]["gap after"] < 1e-4
    assert not found["group left"]


@needs_vllm
@pytest.mark.slow
def test_samples_are_as_frequent_as_the_guided_law_says(found: dict[str, Any]) -> None:
    assert found["frequencies"]["the law"] > 0.001 and found["frequencies"]["another"] < 1e-9


@needs_vllm
@pytest.mark.slow
def test_between_rollouts_it_sleeps_and_whatever_is_asked_next_wakes_it(found: dict[str, Any]) -> None:
    facts = found["sleep"]
    assert facts["asleep"] and facts["awake"] and facts["agrees"]
    assert max(facts["gaps"]) < 1e-4 and facts["gap after sync"] < 1e-4
    assert "leep" in facts["refused"]


@needs_vllm
@pytest.mark.slow
def test_a_grpo_stage_goes_the_same_way_under_both_engines(found: dict[str, Any]) -> None:
    ours, theirs = found["stage"]
    assert len(ours) == len(theirs) == 4
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(reference, rel=1e-3, abs=1e-5)


@needs_vllm
@pytest.mark.slow
def test_in_bfloat16_weights_arrive_and_a_sync_that_did_not_take_place_shows(found: dict[str, Any]) -> None:
    means = [row["mismatch/mean"] for row in found["bfloat16"]["rows"] if "mismatch/mean" in row]
    assert len(means) == 2 and all(1e-5 < mean < TOLERANCE["bfloat16"] for mean in means)  # it really rounds
    assert found["bfloat16"]["syncs"] == 2
    assert "after the weight sync of rollout 1 the engine's weights" in found["bfloat16"]["skipped"]


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "simplear", "blip3o_next"])
def test_the_saved_adapter_loads_in_stock_vllm_and_gives_the_trainers_log_probs(
    found: dict[str, Any], model: str
) -> None:
    """In vLLM's own Llama, Qwen2 and Qwen3."""
    facts = found["stock adapter"][model]
    assert facts["with"] < 1e-4 and facts["without"] > 0.1


@needs_vllm
@pytest.mark.slow
def test_the_plugin_registers_architectures(found: dict[str, Any]) -> None:
    assert found["registered"]


def test_without_a_null_token_there_are_no_two_streams_and_the_error_says_what_to_do() -> None:
    layout = Layout(vocab_size=9, text=(0, 4), image=(4, 9), bos=0, pad=1, boi=(2,), grid=Grid(1, 2, row_end=1))
    with pytest.raises(ValueError, match="engine.two_streams: false"):
        plugin.two_stream_overrides(layout)
    found = plugin.two_stream_overrides(replace(layout, null_token=3))
    assert found["rollouts_null"] == {"text": [0, 4], "given": [0, 1, 2], "token": 3}


def test_without_vllm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="install the extra `cpu`"):
        LocalHost(Path("nowhere"), **SIZES)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="inside a single process"):
        LocalHost(Path("nowhere"), **SIZES)


@needs_vllm
@pytest.mark.long
def test_rollouts_are_drawn_ahead_by_vllm_too() -> None:
    """In this process and as a server: a sync between two draws, the draws in a thread, and the torch engine's run."""
    torch_rows, *others = answer_of("vllm_ahead_program.py", timeout=900)["rows"]
    assert [row["staleness"] for row in torch_rows] == [0, 1, 1, 1]
    for rows in others:
        assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
        assert max(row["mismatch/max"] for row in rows) < 1e-4
        for name in ("reward/mean", "grad_norm", "mismatch/weight"):
            assert [row[name] for row in rows] == pytest.approx([row[name] for row in torch_rows], rel=1e-3)
