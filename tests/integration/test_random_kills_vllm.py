"""Kills at arbitrary moments of GRPO by vLLM, which promises no equal bits: what was finished is kept and read back,
and the rest is drawn again, from the same seeds, through the same gates.

Two runs of four kills with vLLM in the training process, one with two processes that have a server each, and one of
which only the server is killed, more than once, which the run survives.
"""

import importlib.util
import json
import os
import re
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.kill_driver import RECIPE
from tests.integration.killing import KILLS, Case, Command, Whole, children, moments

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
STEPS, ATTEMPTS = 6, 4
COMMON = ("policy.hidden_size=64", "stages.grpo.objective.updates_per_rollout=1")
ENGINE = "stages.grpo.engine={{kind: {}, kv_megabytes: 32, max_rows: 32}}"
CASES = {
    "in process": Case(RECIPE, 1, (*COMMON, ENGINE.format("vllm"))),
    "servers of two": Case(RECIPE, 2, (*COMMON, ENGINE.format("vllm_server"))),
}
SERVER = Case(RECIPE, 1, CASES["servers of two"].settings)


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What a run left alone says of GRPO, and when: the other stages have no engine. Its end is GRPO's."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("whole") / "run"
    said, _ = Command(folder, case).finish()
    of_grpo = [at for at in said if re.match(r"grpo (\(|\d)", at[0])]
    return Whole(case, tokens(folder), of_grpo, next(at for line, at in said if line.startswith("evaluation")))


def rollouts(folder: Path) -> list[Path]:
    return sorted(folder.glob("stages/*-grpo/rollouts/*.parquet"))


def tokens(folder: Path) -> dict[str, str]:
    """The tokens of every stored rollout."""
    return {path.name: str(pq.read_table(path, columns=["trajectory/ids"]).to_pydict()) for path in rollouts(folder)}


def finished(folder: Path) -> dict[str, int]:
    """When the rollouts that passed their gates were written: a record beside the file is written last."""
    return {path.name: path.stat().st_mtime_ns for path in rollouts(folder) if path.with_suffix(".json").is_file()}


def check(folder: Path, whole: Whole) -> None:
    """It took every step, within float32's rounding of the trainer, and drew what a run left alone drew."""
    (stage,) = folder.glob("stages/*-grpo")
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert max(row["mismatch/max"] for row in rows) < 1e-4
    assert len(whole.files) == STEPS * whole.case.processes and tokens(folder) == whole.files


@pytest.mark.parametrize(
    ("whole", "run"), [("in process", 0), ("in process", 1), ("servers of two", 1)], indirect=["whole"]
)
def test_what_was_finished_is_kept_and_the_rest_drawn_again(whole: Whole, run: int, tmp_path: Path) -> None:
    kills: list[str] = []
    for attempt in range(ATTEMPTS):
        folder, kept = tmp_path / f"run{attempt}", dict[str, int]()
        for moment in moments(run, whole)[len(kills) :]:
            found = Command(folder, whole.case).kill_at(moment)
            assert kept.items() <= finished(folder).items()
            if found is None:  # the kill before came later than meant: what is left of them goes to another run
                break
            kept = finished(folder)
            kills.append(f"{found}, {len(kept)} rollouts finished")
        Command(folder, whole.case).finish()
        assert kept.items() <= finished(folder).items()
        check(folder, whole)
        if len(kills) == KILLS:
            break
    print(*kills, sep="\n")
    assert len(kills) == KILLS


@pytest.mark.parametrize("whole", ["in process"], indirect=True)
def test_a_server_killed_at_any_moment_changes_nothing(whole: Whole, tmp_path: Path) -> None:
    command, killed = Command(tmp_path / "run", SERVER), list[int]()
    asked = {moment.line: moment.delay for moment in moments(0, whole) if moment.line != "grpo (grpo)"}
    for line in command.lines():
        if line in asked:
            time.sleep(asked[line])
            # There may be none that was not killed: the next is started when the loss is noticed, by the next rollout.
            for server in {*children(command.process.pid, sessions=True)} - {*killed}:
                os.killpg(server, signal.SIGKILL)
                killed.append(server)
    assert command.process.returncode == 0, command.log.read_text()[-6000:]
    assert len(killed) >= 2
    check(tmp_path / "run", whole)
