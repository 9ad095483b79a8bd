"""DeepSpeed on a GPU, over NCCL: a run of its own process, its first update that of a run without it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlmm.train.metrics import MetricsFile
from tests.integration.conftest import TINY
from tests.integration.programs import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


def rows_of(folder: Path, *overrides: str, stage: str = "grpo") -> list[dict[str, Any]]:
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "rlmm.cli", "run"]
    command = [sys.executable, *launched, str(TINY), f"run_dir={folder}", *overrides]
    # What the other tests set for a CPU.
    around = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (made,) = (folder / "stages").glob(f"*-{stage}")
    return MetricsFile(made / "metrics.jsonl").read()


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_run_under_deepspeed_begins_as_one_without(zero: str, tmp_path: Path) -> None:
    plain = rows_of(tmp_path / "plain")
    parts = rows_of(tmp_path / zero, f"stages.grpo.deepspeed={ROOT / 'configs' / 'deepspeed' / f'{zero}.json'}")
    assert len(parts) == len(plain) > 1
    assert all(row["mismatch/mean"] < 1e-5 for row in [*plain, *parts] if "mismatch/mean" in row)
    assert parts[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-2)


def test_a_codec_in_bfloat16_rounds_under_deepspeed_too(tmp_path: Path) -> None:
    file, half = ROOT / "configs" / "deepspeed" / "zero2.json", "stages.codec.precision=bfloat16"
    settings = {"float32": [], "plain": [half], "zero2": [half, f"stages.codec.deepspeed={file}"]}
    found = {name: rows_of(tmp_path / name, *given, stage="codec")[0] for name, given in settings.items()}
    exact, plain, parts = (found[name]["grad_norm"] for name in settings)
    assert parts == pytest.approx(plain, rel=1e-3) and plain != pytest.approx(exact, rel=1e-5)
