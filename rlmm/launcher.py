"""`rlmm run --nproc`: the processes of one machine, started by torchrun."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

SHUTDOWN_SECONDS = 600
"""How long the processes may take over their last step when they are asked to stop, before they are killed."""


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
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main  # slow to import, and no other command needs it

    # Standalone: a free port of this machine, so that two runs do not meet.
    own = ["--standalone", f"--nproc-per-node={nproc}", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]
    own += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m", "rlmm.cli", "run", str(config)]
    sys.stdout.flush()
    try:
        main([*own, *overrides])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        raise SystemExit(code if code > 0 else 128 - code) from error
    except SignalException as error:
        raise SystemExit(_after_signal(error.sigval, config, overrides)) from error


def _after_signal(number: int, config: Path, overrides: Sequence[str]) -> int:
    """The exit code once torchrun has passed a signal on and its processes have ended: whether they stopped by
    themselves is in the run's folder."""
    from rlmm.config.recipe import read_recipe
    from rlmm.run_folder import RunFolder
    from rlmm.train.signals import EXIT_STOPPED

    recipe = read_recipe(config, list(overrides))
    run = RunFolder(recipe.folder, tuple(recipe.stages))
    stopped = any(run.status(name).get("status") == "stopped" for name in recipe.stages)
    return EXIT_STOPPED if stopped else 128 + number
