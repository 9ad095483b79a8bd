"""Rollouts drawn a step ahead: while rollout r is scored and trained on, r + 1 is drawn in another thread, by the
weights that were there when r's turn began.

So the weights that draw a rollout are at most one rollout older than those it trains (`Drawn.staleness`). The thread
draws with a copy of the policy and touches nothing of the training; a token depends on its seed and on the weights'
version alone, so when the thread runs cannot matter. A checkpoint holds the rollout that is under way, since the
weights that draw it are gone by then.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rewards.base import Sample
from rlmm.config.stages import GrpoStage
from rlmm.policies.still import Still
from rlmm.train.checkpoint import PREFIX
from rlmm.train.context import StageContext
from rlmm.train.experience import Timed, png_bytes, rollout_path
from rlmm.train.faults import storing
from rlmm.train.gates import Mismatch, check_mismatch, measure_mismatch
from rlmm.train.processes import gather, world
from rlmm.train.read_back import finished, gate_settings
from rlmm.train.rounds import Roller
from rlmm.train.sync import synced
from rollouts.store import write_trajectory
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class Drawn:
    """Samples of rollout `rollout` of this process, not scored. `weights`: the fingerprint of those that drew them;
    `mismatch`: of the trainer's log-probs under the same weights."""

    rollout: int
    weights: str
    made: Trajectory
    samples: list[Sample]
    mismatch: Mismatch

    @property
    def staleness(self) -> int:
        """By how many rollouts the weights that drew it are older than those it trains first."""
        return self.rollout - self.made.weights_version


def in_thread() -> Executor:
    """What draws behind the main thread."""
    return ThreadPoolExecutor(1, "rollouts ahead")


def under_way_path(folder: Path) -> Path:
    """This process's, in a checkpoint."""
    return folder / f"ahead.rank{world()[0]}.parquet"


class Ahead:
    """Draws what `roller` (made with the policy of `still`) would, one rollout ahead of the one that is asked for."""

    def __init__(
        self, context: StageContext, roller: Roller, still: Still, worker: Callable[[], Executor] | None = None
    ) -> None:
        self.context, self.roller, self.still = context, roller, still
        self.config: GrpoStage = context.config
        self.last = (self.config.steps - 1) // self.config.objective.updates_per_rollout
        self.worker = (worker or in_thread)()
        self.under_way: Future[Drawn] | None = None

    def take(self, rollout: int, timed: Timed) -> tuple[Drawn, dict[str, float]]:
        """The rollout, waited for, and its figures; the one after it is begun, with the weights of now.

        Raises GateError where sampler and trainer disagree about the log-probs under the weights that drew it, and
        RuntimeError where those are older than by one rollout.
        """
        with timed("rollout"):
            if self.under_way is None:
                self._begin(rollout, rollout)
            assert self.under_way is not None, "begun"
            drawn = self.under_way.result()
            self.under_way = None
            if drawn.rollout != rollout or not 0 <= drawn.staleness <= self.config.max_staleness:
                raise RuntimeError(
                    f"rollout {drawn.rollout} was drawn by the weights of rollout {drawn.made.weights_version}, and "
                    f"rollout {rollout} is to be trained on now; this is a fault of rlmm: set max_staleness to 0, and "
                    "report it"
                )
            if rollout < self.last:
                self._begin(rollout + 1, rollout)
        return drawn, self._gated(drawn)

    def save(self, folder: Path) -> None:
        """Wait for the rollout that is under way, and keep it in the folder."""
        if self.under_way is None:
            return
        drawn = self.under_way.result()
        columns = {
            "image": [png_bytes(sample.images[0]) if sample.images else None for sample in drawn.samples],
            "text": [sample.text for sample in drawn.samples],
            "step": [drawn.rollout] * len(drawn.samples),
            "weights": [drawn.weights] * len(drawn.samples),
            "mismatch": [[drawn.mismatch.total, drawn.mismatch.count, drawn.mismatch.largest]] * len(drawn.samples),
        }
        path = under_way_path(folder)
        with storing(f"rollout {drawn.rollout}, drawn ahead", path):
            write_trajectory(path, drawn.made, columns)

    def load(self, folder: Path) -> None:
        """Go on from the folder's. Where it has none the next rollout is drawn by the weights it trains."""
        path = under_way_path(folder)
        if not path.is_file():
            return
        made, samples, columns = self.roller.read(path)
        step, weights, (total, count, largest) = (columns[name][0] for name in ("step", "weights", "mismatch"))
        self.under_way = Future()
        self.under_way.set_result(Drawn(step, weights, made, samples, Mismatch(total, int(count), largest)))

    def close(self) -> None:
        self.worker.shutdown()

    def _begin(self, rollout: int, version: int) -> None:
        self.still.take()
        weights = synced(self.still.live, self.roller.engine, version)
        path = rollout_path(self.context.folder, rollout)
        record = finished(path, gate_settings(self.context))
        made = record is not None and record["weights"] == weights
        self.under_way = self.worker.submit(self._drawn, rollout, weights, path if made else None)

    @torch.no_grad()
    def _drawn(self, rollout: int, weights: str, made_before: Path | None) -> Drawn:
        """Drawn, or read back where a run that was ended has drawn it with these weights, and finished it."""
        device = self.still.policy.base.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        made, samples = self.roller.draw(rollout) if made_before is None else self.roller.read(made_before)[:2]
        return Drawn(rollout, weights, made, samples, self._mismatch(made))

    def _mismatch(self, made: Trajectory) -> Mismatch:
        """Of the sampler's log-probs and the trainer's, under the weights of the copy."""
        size, policy = self.config.micro_batch_size, self.still.policy
        runs = [made.rows(list(range(at, min(at + size, len(made))))) for at in range(0, len(made), size)]
        parts = [policy.log_probs(run.to(policy.base.device)).logp_BS.cpu() for run in runs]
        return measure_mismatch(torch.cat(parts), made.sampler_logp, made.target_mask)

    def _gated(self, drawn: Drawn) -> dict[str, float]:
        parts = [Mismatch(**part) for part in gather(asdict(drawn.mismatch))]
        found = Mismatch(
            sum(one.total for one in parts), sum(one.count for one in parts), max(one.largest for one in parts)
        )
        check_mismatch(found, self.config.gates, self.config.precision)
        return {"mismatch/mean": found.mean, "mismatch/max": found.largest, "staleness": float(drawn.staleness)}


class KeepAhead(TrainerCallback):
    """Puts the rollout that is under way into every checkpoint, before it is sealed, and takes it from the one that
    training goes on from."""

    def __init__(self, ahead: Ahead) -> None:
        self.ahead = ahead

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ahead.load(Path(args.output_dir) / f"{PREFIX}{state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ahead.save(Path(args.output_dir) / f"{PREFIX}{state.global_step}")
