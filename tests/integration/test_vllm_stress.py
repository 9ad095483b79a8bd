"""Guided samples of a real vLLM where it queues, splits, delays and evicts: every one is the torch engine's."""

import importlib.util

import pytest

from tests.integration.programs import answer_of

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@needs_vllm
@pytest.mark.parametrize(
    "samples", [pytest.param(60, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.long)]
)
def test_every_sample_replays_and_is_the_torch_engines(samples: int) -> None:
    found = answer_of("vllm_stress.py", str(samples), timeout=1800)
    assert {name: case["streams"] for name, case in found.items()} == {
        "pairs, few slots": 1,
        "one request, evictions": 2,
        "one request, chunks": 2,
        "unguided, evictions": 1,
    }
    for name, case in found.items():
        assert case["samples"] == samples and case["gap"] < 1e-4, name
        assert case["same samples"] == 1.0, name
    assert found["one request, evictions"]["evicted"] > 0 and found["unguided, evictions"]["evicted"] > 0
    assert found["pairs, few slots"]["evicted"] == 0
