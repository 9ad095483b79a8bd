"""What a run shows while it goes: a bar with the time left on a terminal, plain flushed lines elsewhere."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SHOWN_AFTER = 2.0
"""Seconds a phase must last before it is shown: most rollouts are over sooner."""

_LINE_EVERY = 10.0
"""Seconds between the lines of a slow phase where there is no terminal."""


class RichProgress(TrainerCallback):
    """One line every `every` steps with the figures named in `keys`, and a bar where there is a terminal.

    The first and the last step get a line too. Only the first process shows anything. Trainer's own progress
    and printer callbacks are to be switched off (`disable_tqdm=True`, `remove_callback(PrinterCallback)`).
    """

    def __init__(self, name: str, keys: Sequence[str] = (), *, every: int = 10, console: Console | None = None) -> None:
        if every < 1:
            raise ValueError(f"every = {every}: a line can be shown every 1 or more steps")
        self.name, self.keys, self.every = name, tuple(keys), every
        self.console = console or Console(highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._shown = True
        self._lined: int | None = None
        self._started = (0, time.monotonic())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._shown = state.is_world_process_zero
        self._lined, self._started = None, (state.global_step, time.monotonic())
        if self._shown and self.console.is_terminal:
            self._bar = _bar(self.console)
            self._task = self._bar.add_task(self.name, total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        step, found = state.global_step, {key: (logs or {}).get(key) for key in self.keys}
        due = self._lined is None or step - self._lined >= self.every or step >= state.max_steps
        if not self._shown or not due or step == self._lined or all(value is None for value in found.values()):
            return
        self._lined = step
        figures = "  ".join(f"{key} {_figure(value)}" for key, value in found.items() if value is not None)
        self._say(f"{self.name} {step}/{state.max_steps}  {figures}  {self._pace(step, state.max_steps)}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar off the terminal. Call it when training raises; calling it twice does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """See `phase`; shares this callback's bar and shows nothing on other processes than the first."""
        with phase(name, total, show=self._shown, console=self.console, bar=self._bar) as advance:
            yield advance

    def _say(self, line: str) -> None:
        _say(self.console, line)

    def _pace(self, step: int, steps: int) -> str:
        first, began = self._started
        if step <= first:
            return ""
        each = (time.monotonic() - began) / (step - first)
        pace = f"{each:.1f} s/step" if each >= 1 else f"{each:.2g} s/step"
        return pace if step >= steps else f"{pace}, {_clock(each * (steps - step))} left"


@contextmanager
def phase(
    name: str,
    total: int | None = None,
    *,
    show: bool = True,
    console: Console | None = None,
    bar: Progress | None = None,
) -> Iterator[Callable[[int], None]]:
    """Shows how far a part of a step, or any other long work, has come, if it takes longer than two seconds.

    Yields `advance(n)`, to be called as `n` of `total` are done. On a terminal the phase is a line under
    `bar` (a bar of its own without one); elsewhere a plain line at most every ten seconds.
    """
    if not show:
        yield lambda n: None
        return
    console = console or Console(highlight=False)
    if not console.is_terminal:
        yield _line_printer(console, name, total)
        return
    shown = bar or _bar(console)
    task = shown.add_task(f"  {name}" if bar else name, total=total, phase=True)
    if bar is None:
        shown.start()
    try:
        yield lambda n: shown.advance(task, n)
    finally:
        shown.remove_task(task)
        if bar is None:
            shown.stop()


class _PatientProgress(Progress):
    """Shows a phase only once it has lasted a while."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table([task for task in self.tasks if not _is_young_phase(task)])


def _is_young_phase(task: Task) -> bool:
    return task.fields.get("phase", False) and (task.elapsed or 0.0) < _SHOWN_AFTER


def _bar(console: Console) -> Progress:
    left = TimeRemainingColumn(compact=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), left)
    return _PatientProgress(*columns, console=console, transient=True)


def _line_printer(console: Console, name: str, total: int | None) -> Callable[[int], None]:
    began = time.monotonic()
    done, spoke = 0, began

    def advance(n: int) -> None:
        nonlocal done, spoke
        done, now = done + n, time.monotonic()
        if now - spoke >= _LINE_EVERY:
            spoke = now
            _say(console, f"  {name} {done}{f'/{total}' if total else ''} after {_clock(now - began)}")

    return advance


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
    console.file.flush()


def _figure(value: float) -> str:
    size = abs(value)
    return f"{value:.3f}" if size == 0 or 1e-3 <= size < 1e4 else f"{value:.2e}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
