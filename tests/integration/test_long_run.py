"""A stage of hundreds of steps holds at its end what it held at its beginning."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

STEPS, SETTLED = 500, 250


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2], ids=["one process", "two under ZeRO-3"])
def test_500_steps_hold_no_more_memory_files_or_threads(tmp_path: Path, processes: int) -> None:
    command = [sys.executable, "-m", "tests.integration.long_run_program", str(tmp_path / "run"), str(STEPS)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command.append("configs/deepspeed/zero3.json")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in json.loads(done.stdout.splitlines()[-1]) if row["step"] >= SETTLED]
    assert rows[-1]["step"] == STEPS and len(rows) >= 10
    first, last = rows[:4], rows[-4:]
    for name in ("open", "threads", "files"):
        assert max(row[name] for row in last) <= max(row[name] for row in first), name
    grown = median(row["resident"] for row in last) - median(row["resident"] for row in first)
    assert grown < 2048, f"{grown} KiB in {STEPS - SETTLED} steps"
