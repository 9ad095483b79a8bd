"""Rewards in processes that a run starts: their environment, their scores, and their end."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from rewards.base import Sample
from rewards.remote import RemoteReward
from rewards.runner import RewardRunner
from rlmm import reward_process
from rlmm.config.recipe import Recipe
from rlmm.config.rewards import RewardTerm
from rlmm.pipeline import run_recipe
from rlmm.rewarding import build_reward
from rlmm.train.metrics import MetricsFile

ROOT = Path(__file__).resolve().parents[2]
OWN = """
import os, sys

def where(samples, scale=1.0, words=()):
    given = os.environ.get("TEST_GIVEN", "")
    return [scale * (sys.prefix == given) + len(words) for _ in samples]

def pid(samples):
    return [float(os.getpid()) for _ in samples]
"""
SAMPLES = [Sample("s", "g", "p", (Image.new("RGB", (2, 2)),))]


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    reward_process.stop_served()


def term(tmp_path: Path, function: str, **more: Any) -> RewardTerm:
    (tmp_path / "own.py").write_text(OWN)
    return RewardTerm.model_validate({"function": f"{tmp_path}/own.py:{function}", "serve": {}, **more})


def alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    # A killed process whose other threads (l) are still on their way out has not ended for who waits for it.
    return bool(state) and (not state.startswith("Z") or "l" in state)


def gone(pid: int) -> bool:
    end = time.monotonic() + 20
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def score(given: RewardTerm) -> float | None:
    return RewardRunner(build_reward(given)).score(SAMPLES)[0].value


@pytest.mark.long
def test_a_term_is_served_once_for_all_who_build_it_and_ends_when_told(tmp_path: Path) -> None:
    given = term(tmp_path, "pid")
    first = score(given)
    assert first is not None and first != os.getpid() and alive(int(first))
    assert isinstance(build_reward(given), RemoteReward)
    assert score(given.model_copy(update={"label": "other", "weight": 0.5})) == first
    os.kill(int(first), signal.SIGKILL)
    assert gone(int(first))
    second = score(given)
    assert second is not None and second != first, "who builds it after its death gets another"
    reward_process.stop_served()
    assert gone(int(second))


@pytest.mark.long
def test_it_runs_in_the_environment_that_the_term_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    (inside / "main.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")  # about this interpreter, not about that one
    settings = {
        "python": str(tmp_path / "env" / "bin" / "python"),
        "environment": {"TEST_GIVEN": str(tmp_path / "env")},
    }
    given = term(tmp_path, "where", serve=settings, options={"scale": 0.5, "words": ["a: b", "null"]})
    assert score(given) == 2.5
    assert score(term(tmp_path, "where", options={"scale": 0.5})) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"options": {"scal": 1}}, "served by|serves the reward 'where'.*status 2.*takes no option 'scal'"),
        ({"serve": {"python": "/nowhere/python"}}, "cannot be served by serve.python /nowhere/python"),
        ({"serve": {"start_seconds": 0.05}}, "did not answer within 0.05 s; raise serve.start_seconds"),
    ],
)
def test_what_does_not_come_up_says_why_and_leaves_nothing(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        build_reward(term(tmp_path, "where", **more))
    assert not reward_process._RUNNING


def test_a_remote_reward_is_not_served_again() -> None:
    with pytest.raises(ValidationError, match="served already"):
        RewardTerm.model_validate({"name": "remote", "options": {"url": "http://a"}, "serve": {}})
    with pytest.raises(ValidationError, match="no reward 'orc'"):
        RewardTerm.model_validate({"name": "orc", "serve": {}})


STARTS = """
import json, sys, time
from rlmm.config.rewards import RewardTerm
from rlmm.rewarding import build_reward
from rlmm import reward_process
build_reward(RewardTerm.model_validate(json.loads(sys.argv[1])))
print([running.process.pid for running in reward_process._RUNNING.values()][0], flush=True)
time.sleep(600)
"""


def test_a_process_does_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    given = json.dumps(term(tmp_path, "pid").model_dump())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = subprocess.Popen([sys.executable, "-c", STARTS, given], stdout=subprocess.PIPE, env=environment)
    assert program.stdout is not None
    served = int(program.stdout.readline())
    assert alive(served)
    program.kill()
    program.wait(10)
    assert gone(served)


def test_a_run_starts_its_reward_and_ends_it(variant: Callable[..., Recipe], tmp_path: Path) -> None:
    served = "rewards={terms: [{function: 'tests/recipes/rewards.py:darkness', serve: {}}]}"
    started: list[int] = []
    real = reward_process.RewardProcess.wait

    def noted(self: reward_process.RewardProcess) -> None:
        started.append(self.process.pid)
        real(self)

    rows = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_process.RewardProcess, "wait", noted)
        for name, asked in (("served", (served,)), ("here", ())):
            recipe = variant(*asked, "stages.grpo.steps=2", f"run_dir={tmp_path / name}")
            folder = run_recipe(recipe, lambda line: None)
            rows[name] = MetricsFile(folder.stage("grpo") / "metrics.jsonl").read()
    assert len(started) == 1 and gone(started[0])
    same = ("reward/mean", "reward/darkness/mean", "loss", "grad_norm")
    assert [[row.get(key) for key in same] for row in rows["served"]] == [
        [row.get(key) for key in same] for row in rows["here"]
    ]
