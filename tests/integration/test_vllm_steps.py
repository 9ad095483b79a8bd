"""Several decode steps a turn of vLLM's scheduler give what one step a turn gives."""

import importlib.util
from typing import Any

import pytest

from tests.integration.programs import answer_of
from tests.integration.test_vllm_rollout import needs_kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    needs_kernels,
]


@pytest.fixture(scope="module", params=["eager", pytest.param("compiled", marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    return answer_of("vllm_steps.py", f"--{request.param}", timeout=600) | {"mode": request.param}


def test_the_model_is_compiled_where_that_is_asked_for(found: dict[str, Any]) -> None:
    assert (found["compiled models"] > 0) == (found["mode"] == "compiled")


@pytest.mark.parametrize("case", ["plain", "guided", "two streams", "bfloat16", "stock attention"])
def test_tokens_and_log_probs_are_those_of_single_steps(found: dict[str, Any], case: str) -> None:
    facts = found[case]
    assert facts["same tokens"] and facts["same log-probs"], facts
    assert facts["gap"] < (1 if case == "bfloat16" else 1e-4), facts
    assert facts["held afterwards"] == 0


@pytest.mark.parametrize("case", ["plain", "guided", "two streams", "bfloat16", "stock attention"])
def test_all_but_a_turns_first_step_go_past_the_modules(found: dict[str, Any], case: str) -> None:
    """Where the kernels cover attention, and no compiler has done away with the modules."""
    flat = case != "stock attention" and found["mode"] == "eager"
    assert found[case]["flat"] == (72 - found[case]["turns"]) * flat


def test_72_tokens_take_a_few_turns(found: dict[str, Any]) -> None:
    """A prompt's, then 31 steps in one, 31 and 8; guided samples go in waves, one here."""
    assert found["plain"]["turns"] <= 5 and found["guided"]["turns"] <= 5


def test_vllms_own_attention_is_planned_for_each_step(found: dict[str, Any]) -> None:
    """Heads of 80, which the kernels do not cover."""
    assert found["stock attention"]["turns"] >= 72
    assert not found["stock attention"]["reserving"] and found["plain"]["reserving"]


def test_evicted_samples_are_the_same(found: dict[str, Any]) -> None:
    """But for rounding: their prefixes are read again, in other batches."""
    facts = found["evicting"]
    assert facts["same tokens"] and facts["gap"] < 1e-4 and facts["evicted"] > 1, facts
    assert facts["turns"] < 100 and facts["held afterwards"] == 0


def test_steps_that_are_added_evict_nobody(found: dict[str, Any]) -> None:
    facts = found["evicting"]
    assert facts["evicted"] == facts["evicted by single steps"], facts


def test_keys_of_a_turn_are_found_again(found: dict[str, Any]) -> None:
    assert found["again"]["same"] and found["again"]["gap"] < 1e-5


def test_no_turn_goes_past_the_end_of_a_row(found: dict[str, Any]) -> None:
    facts = found["lengths"]
    assert facts["same"] and facts["lengths"] == facts["drawn"] == [1, 2, 7, 33, 34, 72]
    assert facts["turns"] < 12


def test_beside_another_request_each_step_is_a_turn(found: dict[str, Any]) -> None:
    facts = found["beside"]
    assert facts["same"] and facts["turns"] >= 40 and facts["log-probs"] == 40
