"""What is planned for vLLM's copy of the weights is what it holds."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.integration.programs import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm_holds_its_weights_in_what_it_computes_in(dtype: str) -> None:
    command = [sys.executable, "-m", "tests.integration.vllm_memory", dtype]
    environment = os.environ | GIVEN_BACK | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    planned, held = map(int, done.stdout.split()[-2:])
    assert planned > 80 << 20
    assert planned == pytest.approx(held, rel=0.15)
