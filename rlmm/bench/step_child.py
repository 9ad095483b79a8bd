"""One side of `rlmm bench step` in a process of its own: `python -m rlmm.bench.step_child ORDER RESULT`."""

import gc
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rlmm.allocator import prepare
from rlmm.bench.step_problem import Side, StepProblem

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Measure(TrainerCallback):
    """Seconds of each step, by the clock and of processor time, and the peak of memory above the loaded trainer's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.baseline = self.peak = 0.0
        self._start = (0.0, 0.0)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.baseline = reset_peak()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        clock, processor = now()
        self.seconds.append(clock - self._start[0])
        self.cpu_seconds.append(processor - self._start[1])

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.peak = read_peak() - self.baseline


def now() -> tuple[float, float]:
    """Seconds by the clock, and of processor time over all threads, once the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def reset_peak() -> float:
    """Bytes held now, from which on the peak counts: of the GPU where there is one, else resident in this process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    if CLEAR.exists():
        CLEAR.write_text("5")  # Linux: the high-water mark falls to what is resident
    return read_peak()


def read_peak() -> float:
    """Most bytes held since `reset_peak`; where a system cannot reset, since the process began."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024.0 * int(line.split()[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return float(scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def run_side(side: Side, problem: StepProblem, steps: int, callback: TrainerCallback) -> None:
    """Make `steps` updates; the callback sees them begin and end. Each side imports its own framework alone.

    Both sides' tensors are padded, so that the peaks are those of what is held."""
    prepare(torch.cuda.is_available())
    with tempfile.TemporaryDirectory() as folder:
        if side.framework == "rlmm":
            from rlmm.bench.step_rlmm import run_rlmm

            run_rlmm(side, problem, steps, callback, Path(folder))
        else:
            from rlmm.bench.step_trl import run_trl

            run_trl(side, problem, steps, callback, Path(folder))


def main(order: Path, result: Path) -> None:
    given = json.loads(order.read_text())
    torch.set_num_threads(given["threads"])
    measure = Measure()
    run_side(Side(**given["side"]), StepProblem(**given["problem"]), given["steps"], measure)
    figures = {name: getattr(measure, name) for name in ("seconds", "cpu_seconds", "baseline", "peak")}
    result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
