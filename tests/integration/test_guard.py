"""The two gates before the optimizer, plain and under DeepSpeed, which steps before Trainer asks anyone."""

import importlib.util
import json
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.integration.programs import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
RUNS = ["plain-0", "zero1-0", "zero2-0", "zero2-1", "zero3-0", "zero3-1"]
UNMOVED = {2, 3, 5}
"""Steps after which all is as it was; the first step, in which nothing counts either, has none before it."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("guard")
    command = [sys.executable, "-m", "tests.integration.guard_program", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in RUNS}


def steps_of(name: str, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What there was after each step; of the run in two parts, whose second part is kept, from the second on."""
    after = found[name]["after"]
    assert len(after) == (5 if name.startswith("zero2") else 6)
    return after


@pytest.mark.parametrize("name", RUNS)
def test_a_step_in_which_nothing_counts_moves_neither_weights_nor_moments(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    after = steps_of(name, found)
    first = 6 - len(after) + 1
    for step, (before, now) in enumerate(pairwise(after), start=first):
        assert (before == now) == (step in UNMOVED), step
        assert (before["state"] == now["state"]) == (step in UNMOVED), step


@pytest.mark.parametrize("name", RUNS)
def test_a_gradient_that_is_no_number_on_one_process_stops_all_before_it_moves_any(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    assert "gradient" in found[name]["stopped"] and "at step 6; no update was made" in found[name]["stopped"]
    before, now = found[name]["after"][-2:]
    assert now == before


@pytest.mark.parametrize("name", RUNS[1:])
def test_the_other_steps_are_those_of_one_process(name: str, found: dict[str, dict[str, Any]]) -> None:
    after = steps_of(name, found)
    for one, two in zip(found["plain-0"]["after"][-len(after) :], after, strict=True):
        torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-6)
