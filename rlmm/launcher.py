"""How the processes of a run are started: `rlmm run --nproc` by torchrun; what another launcher may and may not say."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rollouts.ports import free_port

SHUTDOWN_SECONDS = 600
"""How long the processes may take over their last step when they are asked to stop, before they are killed."""

ACCELERATE_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": "--mixed_precision: a stage's `precision` says it",
    "ACCELERATE_DYNAMO_BACKEND": "--dynamo_backend: no stage is compiled",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed: name the file in each stage's `deepspeed`, and let --multi_gpu start "
    "the processes",
    "ACCELERATE_USE_FSDP": "--use_fsdp: weights are kept in parts by DeepSpeed, a stage's `deepspeed`",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm: weights are kept in parts by DeepSpeed, a stage's `deepspeed`",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config: processes share out a step's prompts alone",
}
"""What `accelerate launch` tells Trainer through the environment, past the recipe."""


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raises ValueError where `accelerate launch` has settings that are the recipe's to make, or was asked for several
    processes and has started one that stands alone."""
    for name, told in ACCELERATE_SETTINGS.items():
        if environment.get(name, "no").lower() not in ("no", "false", "0", ""):
            raise ValueError(
                f"accelerate launch has set {name}={environment[name]}, by an option or by its own configuration file, "
                f"and the recipe would not say how its run was trained. Leave it out, {told}"
            )
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment and "WORLD_SIZE" not in environment:
        raise ValueError(
            "accelerate launch was asked for several processes, and without GPUs (or with --cpu) it starts one, or by "
            "mpirun some that do not know of each other. Give it --multi_gpu, which starts processes on CPUs as well, "
            "or use rlmm run --nproc or torchrun"
        )


def launch(nproc: int, config: Path, overrides: Sequence[str]) -> None:
    """Run `rlmm run CONFIG OVERRIDES` in `nproc` processes of this machine, and exit as the first that fails does.

    The command is torchrun's own (`torch.distributed.run`), so that one process that fails takes the others along.
    Raises ValueError where a launcher has started this process already.
    """
    if "WORLD_SIZE" in os.environ:
        raise ValueError(
            f"--nproc {nproc} in a process that a launcher started (WORLD_SIZE is {os.environ['WORLD_SIZE']}); leave "
            "--nproc out, or call rlmm without the launcher"
        )
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main  # slow to import, and no other command needs it

    own = [f"--shutdown-timeout={SHUTDOWN_SECONDS}", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    own += ["-m", "rlmm.cli", "run", str(config), *overrides]
    sys.stdout.flush()
    try:
        try:
            main([*on_this_machine(nproc), *own])
        except DistNetworkError:  # before any process was started: the port was taken meanwhile
            main([*on_this_machine(nproc), *own])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        raise SystemExit(code if code > 0 else 128 - code) from error
    except SignalException as error:
        raise SystemExit(_after_signal(error.sigval, config, overrides)) from error


def on_this_machine(nproc: int) -> list[str]:
    """What torchrun is told to start processes here. Not --standalone: with it torchrun reads pickles from its store,
    which listens to other machines too, and asks for no token. A free port, so that two runs do not meet."""
    return [f"--nproc-per-node={nproc}", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]


def _after_signal(number: int, config: Path, overrides: Sequence[str]) -> int:
    """The exit code once torchrun has passed a signal on and its processes have ended: whether they stopped by
    themselves, or were through with all stages, is in the run's folder."""
    from rlmm.config.recipe import read_recipe
    from rlmm.run_folder import RunFolder
    from rlmm.train.signals import EXIT_STOPPED

    recipe = read_recipe(config, list(overrides))
    run = RunFolder(recipe.folder, tuple(recipe.stages))
    if all(run.done(name) for name in recipe.stages):
        return 0
    stopped = any(run.status(name).get("status") == "stopped" for name in recipe.stages)
    return EXIT_STOPPED if stopped else 128 + number
