"""Steps of a tiny model around the guard, plain and under DeepSpeed's ZeRO, in forked processes: `FOLDER`.

Leaves KIND-RANK.json: after each step the weights and a digest of this process's optimizer state; what stopped the run.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rlmm.config.optimization import Optimization
from rlmm.train.checkpoint import latest_checkpoint
from rlmm.train.gates import GateError
from rlmm.train.guard import innermost
from rlmm.train.launch import processes
from rlmm.train.metrics import Meter, MetricsFile
from rlmm.train.processes import world
from rlmm.train.trainer import StageTrainer, training_arguments
from tests.integration.forked import fork_group

ROWS, STEPS = 4, 6
NOTHING, SPOILT = {0, 2, 3}, 5
"""The steps in which nothing counts, and that whose gradient is no number on the last process."""
KINDS = {"plain": 1, "zero1": 1, "zero2": 2, "zero3": 2}
"""Which ZeRO, on how many processes."""
STOPS = {"zero2": (1, STEPS)}
"""Of runs in parts, each in processes of its own: where they end."""


@dataclass
class Rows:
    """This process's rows of a step, and whether its loss is to have a gradient that is no number."""

    x_NI: Tensor
    weight: float
    spoilt: bool

    def to(self, device: Any) -> "Rows":
        return self


class Steps:
    """Two micro-batches a process and step, of the same rows on however many processes."""

    micro_batches_per_step = 2
    nothing_counts = False

    def micro_batches(self, step: int) -> list[Rows]:
        rank, size = world()
        self.nothing_counts = step in NOTHING
        x_NI = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(step)).chunk(size)[rank]
        spoilt = step == SPOILT and rank == size - 1
        return [Rows(part, float(not self.nothing_counts), spoilt) for part in x_NI.chunk(2)]


def loss(model: nn.Module, rows: Rows, meter: Meter) -> Tensor:
    made_N = model(rows.x_NI).square().sum(-1)
    # The root's slope at 0 has no value: a loss of 0 whose gradient is no number.
    return rows.weight * made_N.sum() + ((made_N - made_N).sum().sqrt() if rows.spoilt else 0)


class Kept(TrainerCallback):
    """What there is after each step."""

    def __init__(self, after: list[dict[str, Any]]) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(kwargs["model"], kwargs["optimizer"])

    def look(self, model: nn.Module, optimizer: Any) -> None:
        parameters = list(model.parameters())
        with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
            weights = torch.cat([parameter.detach().flatten() for parameter in parameters])
        state = [v for s in innermost(optimizer).state.values() for v in s.values()]
        moments = [v.detach().flatten().double() if isinstance(v, Tensor) else torch.tensor([v]) for v in state]
        digest = hashlib.sha256(b"".join(v.double().numpy().tobytes() for v in moments)).hexdigest()
        self.after.append({"weights": weights.tolist(), "state": digest})


def train(kind: str, folder: Path, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    settings = Optimization(
        steps=steps, learning_rate=0.05, schedule="constant", weight_decay=0.1, checkpoint_every=1,
        deepspeed=None if kind == "plain" else str(folder.parent / f"{kind}.json"),
    )  # fmt: skip
    arguments = training_arguments(
        settings, folder / "checkpoints", micro_batch_size=1, accumulation=2, report_to=(), name="guard"
    )
    after: list[dict[str, Any]] = []
    kept = Kept(after)
    trainer = StageTrainer(
        model, arguments, Steps(), loss, MetricsFile(folder / "metrics.jsonl"), Meter(), callbacks=[kept]
    )
    try:
        trainer.run(print, latest_checkpoint(folder / "checkpoints", print))
    except GateError as error:
        kept.look(model, trainer.optimizer)
        return {"after": after, "stopped": str(error)}
    return {"after": after, "stopped": None}


def configuration(stage: int) -> dict[str, Any]:
    zero = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": 0,
    }
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict.fromkeys(sizes, "auto") | {"zero_allow_untested_optimizer": True, "zero_optimization": zero}


def main(folder: Path) -> None:
    for stage in (1, 2, 3):
        (folder / f"zero{stage}.json").write_text(json.dumps(configuration(stage)))
    for kind, count in KINDS.items():
        (folder / kind).mkdir()
        for steps in STOPS.get(kind, (STEPS,)):

            def work(rank: int, kind: str = kind, steps: int = steps) -> None:
                with processes(deepspeed=kind != "plain"):
                    found = train(kind, folder / kind, steps)
                    (folder / f"{kind}-{rank}.json").write_text(json.dumps(found))

            if any(fork_group(work, folder / f"{kind}.log", count=count)):
                raise SystemExit((folder / f"{kind}.log").read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
