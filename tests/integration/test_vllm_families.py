"""Published families on a real vLLM: the trainer's law, the torch engine's tokens, and a sync that is missed shows."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.families.checkpoints import SIZES, WRITERS
from tests.integration.vllm_requests import LAWS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


LONG = ("chameleon", "lumina_mgpt", "llamagen", "simplear", "blip3o_next", "glm_image")
"""Families that another of the suite is much like."""
EAGER = "llamagen_text"
"""What cannot be compiled."""
SHORT = tuple(name for name in SIZES if name not in LONG)
RUNS = [
    ("eager", SHORT), ("eager", LONG), ("compiled", tuple(name for name in SHORT if name != EAGER)), ("compiled", LONG),
    ("served", ("emu3", "janus")), ("devices", ("emu3", "janus")),
]  # fmt: skip
"""What one program goes through: in this process, by a server, by a server over two devices. The suite has the first.
"""
CASES = [
    pytest.param(name, run, id=f"{name}-{run[0]}", marks=[pytest.mark.long] * (run is not RUNS[0]))
    for run in RUNS
    for name in run[1]
]
of_each_family = pytest.mark.parametrize(("name", "through"), CASES)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.integration.vllm_families", *arguments], cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@functools.cache
def ran(*arguments: str) -> dict[str, Any]:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def found(name: str, through: tuple[str, tuple[str, ...]]) -> dict[str, Any]:
    mode, names = through
    return ran(*names, f"--{mode}")[name]


@of_each_family
def test_each_law_is_the_trainers_and_the_tokens_are_the_torch_engines(found: dict[str, Any]) -> None:
    laws = found["laws"]
    assert set(laws) == set(LAWS)
    assert all(law["gap"] < 1e-4 and law["decided"] > 0 for law in laws.values()), laws
    # A draw at whose edge the two engines round apart sends a sample another way: of the 32,768 codes of Emu3 one has a
    # probability of 1e-5. Half of the laws see none.
    same = sorted(law["same"] for law in laws.values())
    assert same[0] > 0.8 and same[len(same) // 2] == 1.0, laws


@pytest.mark.parametrize(("name", "through"), [case for case in CASES if case.values[0] in WRITERS])
def test_a_thought_and_its_image_are_the_trainers_and_the_torch_engines(found: dict[str, Any]) -> None:
    thought = found["thought"]
    assert thought["gap"] < 1e-4 and thought["text"] > 0 and thought["image"] > 0, thought
    assert thought["same"] > 0.5, thought  # a draw at whose edge the engines round apart parts a row


@of_each_family
def test_the_weights_that_run_are_the_trainers_and_a_missed_sync_shows(found: dict[str, Any]) -> None:
    assert found["agrees"] == [True, False, True]


@of_each_family
def test_it_runs_where_it_was_told(found: dict[str, Any], through: tuple[str, tuple[str, ...]]) -> None:
    assert found["workers"] == {"served": 1, "devices": 2}.get(through[0], 0)


@pytest.mark.long
def test_what_cannot_be_compiled_says_so() -> None:
    done = run(EAGER, "--compiled")
    assert done.returncode and "leave engine.enforce_eager true" in done.stderr
