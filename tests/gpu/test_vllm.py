"""vLLM on a GPU: the trainer's law, the torch engine's tokens, memory given back while it sleeps, one GRPO stage by
every engine."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.integration.programs import ROOT
from tests.integration.vllm_requests import LAWS, check_writing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@functools.cache
def found(part: str, mode: str = "eager") -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.vllm_program", part, f"--{mode}"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])[part]


of_both = pytest.mark.parametrize("mode", ["eager", "compiled"])


@of_both
def test_each_law_is_the_trainers_and_the_tokens_are_the_torch_engines(mode: str) -> None:
    facts = found("contract", mode)
    assert (facts["graphs"] > 0) == (mode == "compiled")
    assert facts["laws"].keys() == LAWS.keys()
    for law, one in facts["laws"].items():
        assert one["gap"] < 1e-4 and all(one.values()), (law, one)
    check_writing(facts["writing"])


@of_both
def test_a_sync_arrives_and_a_missed_or_half_taken_one_shows(mode: str) -> None:
    syncs = found("contract", mode)["syncs"]
    assert syncs["at the start"] and syncs["done"]["agrees"] and syncs["after half"]["agrees"]
    assert max(syncs["done"]["gap"], syncs["after half"]["gap"]) < 1e-4
    assert not syncs["skipped"]["agrees"] and syncs["skipped"]["gap"] > 0.01
    assert not syncs["half"] and not syncs["later change leaks in"]


def test_what_cannot_be_sampled_is_an_error_and_the_engine_goes_on() -> None:
    faults = found("contract")["faults"]
    assert "RuntimeError: vLLM did not follow the draws" in faults["parted"] and faults["gap after"] < 1e-4


def test_two_streams_tied_embeddings_and_frequencies() -> None:
    facts = found("others")
    assert facts["two streams"]["streams"] == 2 and facts["two streams"]["agrees"] == [True, False, True]
    for law, one in facts["two streams"]["laws"].items():
        assert one["gap"] < 1e-4 and all(one.values()), (law, one)
    assert facts["tied"]["agrees"] == [True, False, True] and facts["tied"]["gap"] < 1e-4
    assert facts["frequencies"]["the law"] > 0.001 and facts["frequencies"]["another"] < 1e-9


def test_a_cache_too_small_or_too_large_names_the_setting() -> None:
    facts = found("others")
    assert "raise engine.kv_megabytes" in facts["small cache"] and "lower engine.kv_megabytes" in facts["large cache"]


def test_asleep_it_gives_memory_back_and_wakes_with_its_weights() -> None:
    facts = found("sleeping")
    awake, asleep, again, closed = facts["free"]
    assert facts["asleep"] and facts["awake"] and asleep - awake > 7000 and again < asleep and closed > again
    assert facts["agrees at first"] and facts["agrees"] and facts["agrees after sync"]
    assert max(*facts["gaps"], facts["gap after sync"]) < 1e-4


@pytest.mark.parametrize("part", ["stage", "served"])
def test_a_grpo_stage_goes_the_same_way_under_every_engine(part: str) -> None:
    reference, *others = found(part)
    assert len(others) == 2
    for rows in others:
        assert len(rows) == len(reference) == 4
        for mine, wanted in zip(rows, reference, strict=True):
            assert mine == pytest.approx(wanted, rel=1e-3, abs=1e-5)
