"""A group's prompt is computed once: counted in the positions that vLLM's model is given."""

import importlib.util
from typing import Any

import pytest

from tests.integration.programs import answer_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return answer_of("vllm_prefix.py", timeout=600)


@pytest.mark.parametrize("case", ["unguided", "paired waves", "two streams", "embeddings"])
def test_the_full_blocks_of_a_prompt_are_computed_for_one_sample_of_its_group(found: dict[str, Any], case: str) -> None:
    """After a sync, again with the same weights (where they are there already), and after another sync."""
    assert found[case]["computed"] == found[case]["wanted"]


def test_forgotten_blocks_are_handed_out_in_the_order_they_lie_in(found: dict[str, Any]) -> None:
    returned, forgotten = found["free blocks"]["returned"], found["free blocks"]["forgotten"]
    assert forgotten == sorted(returned) != returned and len(forgotten) > 100
