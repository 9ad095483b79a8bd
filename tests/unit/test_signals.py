"""Signals that ask a run to stop: what is kept, what is left at once, and what a second one does."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from rlmm import cli
from rlmm.train import signals
from rlmm.train.faults import StorageError
from rlmm.train.processes import Stopped, everywhere, in_first
from rlmm.train.signals import StopWhenAsked, asked, leaving, listening, stop_if_asked


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
    tiny = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
    monkeypatch.setattr(sys, "argv", ["rlmm", "run", str(tiny)])

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
    assert f"stopped by SIGTERM; what is done is kept. Go on with the same command: rlmm run {tiny}" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    assert code_of(StorageError("the disk is full")) == 2
    assert "error: the disk is full" in capsys.readouterr().err
