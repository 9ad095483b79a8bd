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
        "two scales, few slots": 1,
        "one request, evictions": 2,
        "one request, chunks": 2,
        "unguided, evictions": 1,
    }
    for name, case in found.items():
        assert case["samples"] == (samples // 3 // 4 * 4 if name.startswith("two scales") else samples), name
        assert case["gap"] < 1e-4 and case["same samples"] == 1.0, name
        assert ("evictions" in name) == (case["evicted"] > 0) or "chunks" in name, name
        assert ("chunks" in name) == (case["split"] > 0), name


@needs_vllm
@pytest.mark.long
def test_evicted_samples_of_families_with_rows_and_columns_are_the_torch_engines() -> None:
    """Their prompts and the codes so far are read again at once, each code at its place."""
    found = answer_of("vllm_stress.py", "60", "glm_image", "llamagen_text", timeout=1800)
    for name, case in found.items():
        assert case["samples"] == 60 and case["gap"] < 1e-4 and case["evicted"] > 0, (name, case)
        assert case["same samples"] == 1.0, (name, case)
