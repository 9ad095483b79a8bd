"""Who is to blame when a run stands still, and that a process which does is ended with a word about it."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from rlmm.train.heart import Phase, now
from rlmm.train.processes import EXIT_HUNG
from rlmm.train.trainer import _Seal
from rlmm.train.watch import GRACE_SECONDS, Beat, Seen, Watch, interval, verdict

ROOT = Path(__file__).parents[2]
LIMIT = 100.0
LATE = 2 * LIMIT


def seen(rank: int, *, still: float = 0.0, silent: float = 0.0, gone: bool = False, **beat: Any) -> Seen:
    told: dict[str, Any] = {"phase": "update", "step": 7, "patient": False} | beat
    return Seen(Beat("run", rank, "node4 pid:[1]", 10 + rank, **told), silent, still, gone=gone)


def test_nothing_is_said_of_a_run_that_moves_or_may_take_its_time() -> None:
    assert verdict([seen(0), seen(1, still=LIMIT - 1)], LIMIT) is None
    assert verdict([seen(0, still=LATE, patient=True), seen(1, still=LATE, waits=True)], LIMIT) is None
    assert verdict([seen(0, still=LATE, silent=LATE, done=True), seen(1)], LIMIT) is None


def test_a_frozen_process_is_named_before_those_that_its_absence_stops() -> None:
    told = verdict([seen(0, still=LATE), seen(1, still=LATE + 1, silent=LATE, phase="rollout")], LIMIT)
    assert told is not None and told.startswith("process 1 (node4, pid 11), last seen in phase 'rollout' of step 7")
    assert "has been silent for 200 s" in told and "process 0" not in told
    assert verdict([seen(0), seen(1, silent=LATE, patient=True)], LIMIT) is not None


def test_nobody_is_blamed_while_another_is_unheard() -> None:
    """Who waits inside a backward seems to stand still a moment longer than who froze before it has been silent."""
    assert verdict([seen(0, still=LIMIT + 1), seen(1, still=LIMIT + 1, silent=LIMIT - 1)], LIMIT) is None
    told = verdict([seen(0, still=LIMIT + 1), seen(1, silent=interval(LIMIT))], LIMIT)
    assert told is not None and told.startswith("process 0")


def test_a_process_that_stands_still_is_named_and_not_those_that_wait_for_it() -> None:
    told = verdict([seen(0, still=LATE, waits=True), seen(1, still=LATE)], LIMIT)
    assert told is not None and "process 1" in told and "process 0" not in told and "stood still" in told
    both = verdict([seen(0, still=LATE), seen(1, still=LATE + 9)], LIMIT)
    assert both is not None and both.index("process 1") < both.index("process 0")  # the first to stop comes first


def test_a_deadlock_is_everyones() -> None:
    stuck = [seen(0, still=LATE, waits=True, phase="wait"), seen(1, still=LATE, waits=True, phase="gather")]
    told = verdict(stuck, LIMIT)
    assert told is not None and told.startswith("every process waits") and "'wait'" in told and "'gather'" in told
    assert verdict([stuck[0], seen(1, waits=True)], LIMIT) is None


def test_who_waits_for_the_others_parts_of_a_checkpoint_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[Phase] = []
    monkeypatch.setattr("rlmm.train.processes.world", lambda: (1, 2))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.barrier", lambda: found.append(now()))
    state = SimpleNamespace(is_world_process_zero=False, global_step=3)
    _Seal().on_save(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), state, None)
    assert [phase.waits for phase in found] == [True]


def test_a_failure_or_a_death_ends_the_others_after_a_while() -> None:
    failed = Seen(Beat("run", 1, "node4", 11, failed="ValueError: no such stage"), 0, 0, GRACE_SECONDS + 1)
    told = verdict([seen(0, waits=True), failed], 1e9)
    assert told == "process 1 has failed: ValueError: no such stage"
    assert verdict([seen(0), Seen(failed.beat, 0, 0, GRACE_SECONDS - 1)], 1e9) is None
    told = verdict([seen(0, waits=True), seen(1, silent=GRACE_SECONDS + 1, gone=True)], 1e9)
    assert told is not None and "process 1" in told and "is gone" in told
    assert verdict([seen(0), seen(1, silent=1, gone=True)], 1e9) is None


def test_of_another_process_is_seen_what_its_file_says_and_whether_there_is_one(tmp_path: Path) -> None:
    watch, other = Watch(tmp_path, "this start", LIMIT), subprocess.Popen(["sleep", "600"])
    told = replace(watch.mine, rank=1, pid=other.pid, phase="update", step=7, patient=False, written=1, moves=1)

    def seen_at(moment: float, **beat: Any) -> Seen:
        nonlocal told
        told = replace(told, **beat)
        watch.path(1).write_text(json.dumps(asdict(told)))
        return watch._look(1, moment)

    assert watch._look(1, 0.0).beat.patient, "one that has not come yet may be loading"
    first = seen_at(10.0)
    assert (first.silent, first.still, first.gone) == (0, 0, False) and "'update' of step 7" in first.beat.place
    assert seen_at(25.0, written=2).still == 15 and watch._look(1, 30.0).silent == 5
    assert seen_at(31.0, written=9, run="an earlier start").silent == 6
    assert seen_at(40.0, written=3, run="this start", moves=2).still == 0
    assert seen_at(50.0, written=4, failed="ValueError: no").failed == 0 and watch._look(1, 61.0).failed == 11
    other.kill()
    other.wait()
    assert watch._look(1, 62.0).gone
    assert not seen_at(63.0, written=5, host="another machine").gone


PROGRAM = """
import sys, time
from pathlib import Path
from rlmm.train.heart import beat, phase, settle
from rlmm.train.watch import watching

with watching(Path(sys.argv[1]), 2.0):
    settle("update", 5)
    for _ in range(6):
        time.sleep(0.5)
        beat()
    with phase("score", patient=True):
        time.sleep(3)
    print("both were long and neither was a hang", flush=True)
    with phase("rollout"):
        time.sleep(60)
"""


@pytest.mark.slow
def test_a_process_that_stands_still_ends_itself_and_names_its_phase(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == EXIT_HUNG, done.stderr
    assert "neither was a hang" in done.stdout
    assert "in phase 'rollout' of step 5, has stood still for 2 s" in done.stderr
    assert 'File "<string>", line 16' in done.stderr  # where it stood
    assert '"failed": "process 0' in (tmp_path / "processes" / "rank-00000.json").read_text()
