"""`rlmm run --nproc`: the processes of one machine, started by torchrun."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def launch(nproc: int, config: Path, overrides: Sequence[str]) -> None:
    """Run `rlmm run CONFIG OVERRIDES` in `nproc` processes of this machine, and exit as they do.

    The command is torchrun's own (`torch.distributed.run`), so that one process that fails takes the others along.
    Raises ValueError where a launcher has started this process already.
    """
    if "WORLD_SIZE" in os.environ:
        raise ValueError(
            f"--nproc {nproc} in a process that a launcher started (WORLD_SIZE is {os.environ['WORLD_SIZE']}); leave "
            "--nproc out, or call rlmm without the launcher"
        )
    from torch.distributed.run import main  # slow to import, and no other command needs it

    # Standalone: a free port of this machine, so that two runs do not meet.
    own = ["--standalone", f"--nproc-per-node={nproc}", "-m", "rlmm.cli", "run", str(config), *overrides]
    sys.stdout.flush()
    main(own)
