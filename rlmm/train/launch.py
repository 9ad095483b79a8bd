"""The process group of a run: there before a stage asks how many processes it has, gone before the process ends."""

import hashlib
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlmm.config.recipe import Recipe
from rlmm.train.processes import EXIT_HUNG, Stopped
from rollouts.ports import free_port

FORMING_SECONDS = 1800.0
"""How long a process waits for the others when a run starts."""


@contextmanager
def processes(*, deepspeed: bool) -> Iterator[None]:
    """Joins the processes that torchrun (or another launcher that sets RANK and WORLD_SIZE) started.

    `deepspeed`: a stage trains under DeepSpeed, which needs a group even for a single process.

    Raises ImportError where DeepSpeed is asked for and not installed.
    """
    if deepspeed:
        _prepare_deepspeed()
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        _one_device()
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _formed_within(FORMING_SECONDS):
        # A day: the others wait while the first process evaluates; `rlmm.train.watch` finds what hangs.
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=1))
    try:
        try:
            yield
        except Stopped:  # all processes have stopped together
            dist.barrier()
            raise
        # A process that leaves while another still talks to it takes both down.
        dist.barrier()
    finally:
        # Without it DeepSpeed's threads now and then abort a process whose work is done.
        dist.destroy_process_group()


@contextmanager
def _formed_within(seconds: float) -> Iterator[None]:
    """Ends this process where what is within takes longer: another has not come, and nothing watches yet."""

    def end() -> None:
        told = f"the process group of {os.environ['WORLD_SIZE']} was not formed within {seconds:g} s"
        print(f"rlmm: {told}; look whether all processes were started", file=sys.stderr, flush=True)
        os._exit(EXIT_HUNG)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _one_device() -> None:
    """Raises RuntimeError where one process sees several GPUs: Trainer would split batches over them by threads."""
    count = torch.cuda.device_count()
    if count > 1:
        raise RuntimeError(
            f"one process and {count} visible GPUs: start a process a GPU (torchrun --nproc_per_node={count} "
            "-m rlmm.cli run ...), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )


def check_deepspeed(path: Path) -> None:
    """Raises ValueError where the file is no DeepSpeed configuration, or one that no stage can train with."""
    settings = _deepspeed(path)
    zero = settings.get("zero_optimization", {})
    if own := [part for part in ("optimizer", "scheduler") if part in settings]:
        raise ValueError(
            f"{path} has a section {' and '.join(own)}, which would take the place of what the recipe says; leave it "
            "out, and set learning_rate, schedule, warmup_steps, weight_decay and betas of the stage"
        )
    stage, moved = zero.get("stage", 0), zero.get("offload_optimizer") or {}
    if not stage:
        raise ValueError(
            f"{path} asks for no ZeRO stage, and without one DeepSpeed measures no gradient norm; use stage 1, 2 or 3 "
            "(configs/deepspeed/zero2.json), or leave `deepspeed` out: torchrun alone shares out a step, too"
        )
    if stage not in (1, 2, 3):
        raise ValueError(f"{path} asks for ZeRO stage {stage}, which there is not; use stage 1, 2 or 3")
    devices = {(zero.get(part) or {}).get("device", "none") for part in ("offload_optimizer", "offload_param")}
    if not devices <= {"none", "cpu"} or moved.get("ratio", 1) != 1:
        raise ValueError(
            f"{path} offloads to {sorted(devices)} with ratio {moved.get('ratio', 1)}, and what is offloaded goes to "
            "the CPU, whole (a part left behind is moved by a second optimizer, past the gates); see "
            "configs/deepspeed/zero3_offload.json"
        )


def deepspeed_files(recipe: Recipe) -> list[Path]:
    """The DeepSpeed files that stages name, each once. Raises ValueError where no stage can train with one."""
    found = {Path(file) for stage in recipe.stages.values() if (file := getattr(stage, "deepspeed", None))}
    for path in found:
        check_deepspeed(path)
    return sorted(found)


def keeps_parts(path: str | None) -> bool:
    """Whether a stage with this DeepSpeed configuration keeps its weights in parts, one on each process."""
    return path is not None and _deepspeed(Path(path))["zero_optimization"]["stage"] == 3


def deepspeed_digest(path: Path) -> str:
    """What the file says, however it is laid out: a SHA-256."""
    return hashlib.sha256(json.dumps(_deepspeed(path), sort_keys=True).encode()).hexdigest()


def _deepspeed(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
        settings.get("zero_optimization", {}).get("stage")
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a readable DeepSpeed configuration ({error}); start from configs/deepspeed/zero2.json"
        ) from error
    return settings


def _prepare_deepspeed() -> None:
    """Environment and switches that DeepSpeed reads when it is imported or first used."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "WORLD_SIZE" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    try:
        import deepspeed as library
    except ImportError as error:
        raise ImportError(
            "a stage names a DeepSpeed configuration and DeepSpeed is not installed; install the extra `deepspeed`, or "
            "take the stage's `deepspeed` out"
        ) from error
    # DeepSpeed calls two collectives by names that a newer torch warns of, at every call.
    by_old_names = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", by_old_names, FutureWarning)
    # Shared-memory collectives for CPUs: compiled at first use, which takes a minute and needs a compiler.
    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
