"""Whether more torch threads than one pay on this machine, now: measured in a process of its own by `rlmm doctor`.

    OMP_NUM_THREADS=2 python -m rlmm.bench.threads 2

prints {"1": seconds, "2": seconds}, the median time of a small decode step's work with one and with two threads.
"""

import json
import subprocess
import sys
from statistics import median

from rlmm.diagnosis import Check

ROUNDS, STEPS = 9, 4
WORTH = 1.3
"""How many times faster more threads must be to be advised: they take cores that judges and other jobs use."""


def measure(threads: int) -> dict[int, float]:
    """Median seconds of a step with 1 and with `threads` threads, in interleaved rounds."""
    import time

    import torch
    from torch.nn import functional as F

    x = torch.randn(128, 256)
    weights = [torch.randn(256, 256) for _ in range(12)]

    def step() -> None:
        y = x
        for weight in weights:
            y = F.layer_norm(F.silu(F.linear(y, weight)), (256,))

    seconds: dict[int, list[float]] = {1: [], threads: []}
    for _ in range(ROUNDS):
        for count, found in seconds.items():
            torch.set_num_threads(count)
            step()
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            found.append((time.perf_counter() - start) / STEPS)
    return {count: median(found) for count, found in seconds.items()}


def measured_apart(threads: int, environment: dict[str, str]) -> dict[int, float] | str:
    """`measure` in a fresh process that may use that many threads, or why there is no figure."""
    command = [sys.executable, "-m", "rlmm.bench.threads", str(threads)]
    variables = {**environment, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables, check=False)
    except subprocess.TimeoutExpired:
        return "the measurement took more than two minutes"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["the measurement failed without a message"])[-1]
    return {int(count): seconds for count, seconds in json.loads(done.stdout).items()}


def check_thread_choice(seconds: dict[int, float] | str) -> Check:
    """`seconds` of a step by its number of threads, or why there are none. rlmm takes one thread by default."""
    chosen = "rlmm uses runtime.threads of the recipe, 1 by default"
    if isinstance(seconds, str):
        return Check("thread choice", "warn", f"not measured: {seconds}; {chosen}", "install torch, then ask again")
    found = ", ".join(f"{count} thread{'s' * (count > 1)}: {time * 1e3:.1f} ms" for count, time in seconds.items())
    best = min(seconds, key=lambda count: seconds[count])
    gain = seconds[1] / seconds[best]
    if best > 1 and gain >= WORTH:
        fix = f"{gain:.1f}x faster with {best}: set runtime.threads={best} for a new run, if no other job needs cores"
        return Check("thread choice", "warn", f"a small step takes {found}; {chosen}", fix)
    return Check("thread choice", "ok", f"a small step takes {found}; {chosen}")


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
