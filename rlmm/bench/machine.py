"""What a benchmark ran on, how it was timed, and how fast this machine multiplies matrices of given shapes."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlmm.run_folder import environment
from rollouts.torch_engine.weights import product


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat: by the clock, and of this process's processor time."""

    wall_s: tuple[float, ...] = ()
    cpu_s: tuple[float, ...] = ()

    def also(self, other: "Timing") -> "Timing":
        return Timing(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)

    @property
    def wall(self) -> float:
        return median(self.wall_s)

    @property
    def cpu(self) -> float:
        return median(self.cpu_s)


def timed(work: Callable[[], object]) -> Timing:
    """One call. Work on a GPU is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timing((time.perf_counter() - wall,), (time.process_time() - cpu,))


@dataclass(frozen=True)
class Shape:
    """A matrix product [rows, inner] x [inner, outer] in one dtype, made `times` a step."""

    rows: int
    inner: int
    outer: int
    dtype: torch.dtype
    times: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.outer * self.times


class ProductStep:
    """All matrix products of one decode step, each with a weight of its own: packed for the processor, and plain."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shapes, self.steps = tuple(shapes), {"packed": [], "plain": []}
        for shape in shapes:
            x = torch.randn(shape.rows, shape.inner, generator=generator).to(device, shape.dtype)
            for _ in range(shape.times):
                weight = torch.randn(shape.outer, shape.inner, generator=generator).to(device)
                self.steps["packed"].append((x, product(weight, None, shape.dtype)))
                self.steps["plain"].append((x, _Plain(weight.to(shape.dtype))))

    @property
    def flops(self) -> int:
        return sum(shape.flops for shape in self.shapes)

    def measure(self, *, at_least_s: float = 0.3) -> Timing:
        """Seconds of one step by the faster of both ways, as a mean over steps that fill `at_least_s`."""
        return min((self._mean(steps, at_least_s) for steps in self.steps.values()), key=lambda found: found.wall)

    def _mean(self, steps: list[tuple[Tensor, Callable[[Tensor], Tensor]]], at_least_s: float) -> Timing:
        def step() -> None:
            for x, multiply in steps:
                multiply(x)

        step()
        if torch.cuda.is_available():
            step = recorded(step)
        total, count = Timing(), 0
        while not count or sum(total.wall_s) < at_least_s:
            total, count = total.also(timed(step)), count + 1
        return Timing((sum(total.wall_s) / count,), (sum(total.cpu_s) / count,))


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """The same work on a GPU as one CUDA graph, so that its time is the kernels' and not that of their launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@dataclass(frozen=True)
class _Plain:
    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def copied_bytes_a_second(size: int | None = None) -> float:
    """How many bytes a second this machine reads and writes (both counted) in a copy of `size` bytes, far more than its
    caches hold: the best of five."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    count = (size or (4 << 30 if on_gpu else 512 << 20)) // 2
    source, target = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    found = 2 * count / min(timed(lambda: target.copy_(source)).wall for _ in range(5))
    if on_gpu:  # torch keeps what is let go of, and what is measured next may need it all
        del source, target
        torch.cuda.empty_cache()
    return found


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch with that many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def setting(threads: int) -> dict[str, Any]:
    """What figures depend on beside the code: processor, threads, load, versions, commit."""
    return {
        **environment(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": threads,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "mkldnn": torch.backends.mkldnn.is_available(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_model() -> str:
    """The processor's name, "unknown" where the system does not say."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
