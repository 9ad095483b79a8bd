"""Signals that ask a run to stop: what is kept, what is left at once, and what a second one does."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from rlmm import cli
from rlmm.config.recipe import read_recipe
from rlmm.launcher import _after_signal
from rlmm.pipeline import STAGES, run_recipe
from rlmm.run_folder import RunFolder
from rlmm.train import signals
from rlmm.train.context import StageContext
from rlmm.train.faults import StorageError
from rlmm.train.processes import Stopped, everywhere, in_first
from rlmm.train.signals import StopWhenAsked, asked, leaving, listening, stop_if_asked

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
STEPS = {"steps": 1, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 1}


class Control:
    should_save = should_training_stop = False


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_asks_and_is_answered_where_the_work_is_whole(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with listening():
        stop_if_asked()
        send(number)
        send(number)  # as a launcher passes on what the terminal has sent
        assert asked()
        with pytest.raises(Stopped, match=number.name):
            stop_if_asked()
    assert signal.getsignal(number) is before and not asked()


def test_work_that_keeps_nothing_is_left_where_it_is() -> None:
    with listening(), pytest.raises(Stopped), leaving(at_once=True):
        send(signal.SIGTERM)
        pytest.fail("the signal was to end this")
    with listening(), leaving(at_once=True):
        with leaving(at_once=False):
            send(signal.SIGTERM)
        with pytest.raises(Stopped), leaving(at_once=True):
            pytest.fail("it had been asked before")


def test_a_second_interrupt_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ECHO_SECONDS", 0.05)
    with listening():
        send(signal.SIGINT)
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_training_ends_after_the_step_with_a_checkpoint() -> None:
    callback, control = StopWhenAsked(), Control()
    with listening():
        callback.on_step_end(None, None, control)
        callback.check()
        assert not control.should_training_stop
        send(signal.SIGUSR1)
        callback.on_step_end(None, None, control)
        assert control.should_training_stop and control.should_save
        with pytest.raises(Stopped, match="SIGUSR1"):
            callback.check()


def test_a_stop_before_a_stage_is_in_its_record_and_the_next_call_begins_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def stage(context: StageContext) -> None:
        begun.append(context.name)

    def report(folder: Path) -> None:
        if len(begun) == 1:
            send(signal.SIGTERM)  # when the first stage is done and the next has not begun

    for name in ("codec", "sft"):
        monkeypatch.setitem(STAGES, name, stage)
    monkeypatch.setattr("rlmm.pipeline.write_report", report)
    stages = {"codec": {"kind": "codec"} | STEPS, "sft": {"kind": "sft", "micro_batch_size": 8} | STEPS}
    overrides = [f"run_dir={tmp_path}", f"stages={json.dumps(stages)}"]
    recipe = read_recipe(TINY, overrides)
    with listening(), pytest.raises(Stopped, match="SIGTERM"):
        run_recipe(recipe, lambda _: None)
    run = RunFolder(tmp_path, tuple(stages))
    assert begun == ["codec"] and [run.status(name)["status"] for name in stages] == ["done", "stopped"]
    assert _after_signal(signal.SIGTERM, TINY, overrides) == signals.EXIT_STOPPED
    run_recipe(recipe, lambda _: None)
    assert begun == ["codec", "sft"] and run.status("sft")["status"] == "done"
    assert run.status("sft")["started"] is not None


def test_a_stop_before_a_stage_binds_it_to_nothing_new_and_frees_it_of_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, ("new", "begun"))
    run.mark_stopped("new", "sft")
    run.mark("new", "sft", "running", processes=3)
    run.mark("begun", "sft", "running", processes=2)
    before = run.status("begun")
    run.mark_stopped("begun", "sft")
    assert run.status("begun") == before | {"status": "stopped"}
    with pytest.raises(ValueError, match="started with 2"):
        run.mark("begun", "sft", "running", processes=3)


def test_what_handles_failures_does_not_take_a_stop_for_one() -> None:
    assert not issubclass(Stopped, Exception)


def test_alone_a_process_has_its_own_results_and_errors() -> None:
    assert everywhere(lambda: 3) == 3 and in_first(lambda: "x") == "x"
    for run in (everywhere, in_first):
        with pytest.raises(ZeroDivisionError):
            run(lambda: 1 // 0)


def test_the_command_ends_with_the_code_of_each_ending(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlmm", "run", str(TINY)])

    def code_of(error: BaseException | None) -> int:
        def run_recipe(*_: object) -> None:
            if error is not None:
                raise error
            send(signal.SIGTERM)
            stop_if_asked()

        monkeypatch.setattr("rlmm.pipeline.run_recipe", run_recipe)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code if isinstance(ended.value.code, int) else -1

    assert code_of(None) == signals.EXIT_STOPPED == 75
    assert f"stopped by SIGTERM; what is done is kept. Go on with the same command: rlmm run {TINY}" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    assert code_of(StorageError("the disk is full")) == 2
    assert "error: the disk is full" in capsys.readouterr().err
