"""Guided samples of a real vLLM where it queues, splits, delays and evicts: every one is the torch engine's."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def measured(samples: int) -> dict[str, Any]:
    answer = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "integration" / "vllm_stress.py"), str(samples)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert answer.returncode == 0, answer.stderr[-6000:]
    return json.loads(answer.stdout.splitlines()[-1])


@needs_vllm
@pytest.mark.parametrize(
    "samples", [pytest.param(60, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.long)]
)
def test_every_sample_replays_and_is_the_torch_engines(samples: int) -> None:
    found = measured(samples)
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
