"""Progress where there is no terminal: which steps get a line, what it says, and who is silent."""

import io

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from rlmm.train import progress
from rlmm.train.progress import RichProgress, phase


def run_steps(shown: RichProgress, steps: int, *, first: int = 0, main_process: bool = True) -> list[str]:
    """Drives the callback as Trainer does and returns the lines it printed."""
    out = io.StringIO()
    shown.console = Console(file=out, width=60, highlight=False)
    arguments, control = TrainingArguments(output_dir="unused", use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=steps, global_step=first, is_world_process_zero=main_process)
    shown.on_train_begin(arguments, state, control)
    for step in range(first + 1, steps + 1):
        state.global_step = step
        shown.on_step_end(arguments, state, control)
        shown.on_log(arguments, state, control, logs={"reward/mean": step / 10, "loss": 2e-5, "other": 1.0})
    shown.on_log(arguments, state, control, logs={"train_runtime": 3.0})
    shown.on_train_end(arguments, state, control)
    return out.getvalue().splitlines()


def test_a_line_at_the_first_every_nth_and_last_step() -> None:
    lines = run_steps(RichProgress("grpo", ["reward/mean", "loss"], every=4), 10)
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "9/10", "10/10"]
    assert "reward/mean 0.500  loss 2.00e-05" in lines[1] and "other" not in lines[1]
    assert lines[1].endswith("left") and not lines[-1].endswith("left")


def test_resumed_run_counts_from_where_it_stands() -> None:
    lines = run_steps(RichProgress("sft", ["loss"], every=100), 8, first=6)
    assert [line.split()[1] for line in lines] == ["7/8", "8/8"]


def test_other_processes_are_silent() -> None:
    shown = RichProgress("grpo", ["loss"], every=1)
    assert run_steps(shown, 3, main_process=False) == []
    with shown.phase("rollout", 2) as advance:
        advance(2)


def test_every_must_be_positive() -> None:
    with pytest.raises(ValueError, match="every = 0"):
        RichProgress("grpo", every=0)


def test_slow_phase_speaks_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 11.0, 12.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with phase("rollout", 8, console=Console(file=out, highlight=False)) as advance:
        for _ in range(4):
            advance(2)
    assert out.getvalue().splitlines() == ["  rollout 4/8 after 0:11", "  rollout 8/8 after 2:10"]


@pytest.mark.parametrize(("patience", "seen"), [(0.0, True), (60.0, False)])
def test_terminal_gets_a_bar_if_it_takes_long_and_loses_it_after_an_error(
    monkeypatch: pytest.MonkeyPatch, patience: float, seen: bool
) -> None:
    monkeypatch.setattr(progress, "_SHOWN_AFTER", patience)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with pytest.raises(RuntimeError, match="no more images"), phase("decode", 4, console=console) as advance:
        advance(1)
        raise RuntimeError("no more images")
    assert ("decode" in out.getvalue()) is seen
    assert "\x1b[?25h" in out.getvalue()  # the cursor is back
