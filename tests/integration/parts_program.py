"""GRPO on two processes under ZeRO-3, by an engine with weights of its own, in forked processes: `FOLDER RUN...`.

What is gathered is let go of as soon as it may be (`TIGHT`), and process 1 replaces a group of each rollout, which the
other does not. RUN names what happens: see `RUNS`. Beside a run's folder lie RUN.json, what process 0 gathered, and
RUN.status.json, how each process ended.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch

from rlmm.policies import parts
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train import grpo, grpo_source
from rlmm.train.grpo_source import GrpoSource
from rlmm.train.recovery import Recovering
from rlmm.train.rounds import Roller, Rollout
from rollouts.contract import EngineLost
from rollouts.torch_engine.causal import TorchEngine
from tests.integration.forked import fork_group
from tests.integration.zero_program import GRPO, LORA, Case, run

TIGHT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
WHOLE = {"whole": GRPO | {"resample_flat": 1, "score_chunk": 1}}
CASE = Case("tiny", ("codec", "sft"), WHOLE, zero=TIGHT)
BOTH = replace(CASE, stages={"adapter": GRPO | {"lora": LORA}} | WHOLE)
LOSSES = {
    "sync": ("sync",),
    "fingerprint": ("fingerprint",),
    "generate": ("generate",),
    "twice": ("generate", "generate"),
}
"""The calls of the second rollout in which process 1 loses its engine."""
RUNS = ("kept", "torn", "failing", *LOSSES)


class Mortal:
    """The torch engine's copy of the weights, lost at the calls of `deaths` as soon as it has version 1."""

    def __init__(self, inner: TorchEngine, deaths: list[str]) -> None:
        self.inner, self.deaths, self.version = inner, deaths, 0
        assert inner.packed is not None
        inner.packed._weights = None

    dtype, reads_policy, takes_adapters = torch.float32, False, False

    def generate(self, *asked: Any) -> Any:
        self._maybe_lost("generate")
        return self.inner.generate(*asked)

    def sync(self, weights: Any, version: int) -> None:
        self.version, weights = version, iter(weights)
        first = next(weights)  # lost in the midst of them
        self._maybe_lost("sync")
        self.inner.sync(chain([first], weights), version)

    def fingerprint(self) -> str:
        self._maybe_lost("fingerprint")
        return self.inner.fingerprint()

    def close(self) -> None:
        """Nothing is held."""

    def _maybe_lost(self, call: str) -> None:
        if self.version == 1 and torch.distributed.get_rank() == 1 and call in self.deaths:
            self.deaths.remove(call)
            raise EngineLost(f"gone in {call}")


class Gathered:
    """Numbers of weights: `every` one, and the most that are there at once in rollouts, in updates and when a stage's
    result is saved. And how often the whole policy was asked for in rollouts."""

    def __init__(self) -> None:
        self.parameters: list[Any] = []
        self.place = "update"
        self.every, self.most, self.whole = 0, {"update": 0, "rollout": 0, "save": 0}, 0

    def watch(self) -> None:
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

        made, gather, fetch = GrpoSource.make, parts._gather, Coordinator.fetch_sub_module
        whole, save = TransformerPolicy.whole, grpo.save_result

        def make(source: GrpoSource, rollout: int) -> Any:
            parameters: list[Any] = list(source.policy.model.parameters())
            self.parameters, self.place = parameters, "rollout"
            self.every = max(self.every, sum(one.ds_numel for one in parameters))
            try:
                return made(source, rollout)
            finally:
                self.place = "update"

        def asked(policy: TransformerPolicy) -> Any:
            self.whole += self.place == "rollout"
            return whole(policy)

        def saved(*args: Any) -> None:
            self.place = "save"
            save(*args)
            self.place = "update"

        grpo.save_result = saved  # pyrefly: ignore
        GrpoSource.make, parts._gather = make, self._noting(gather)  # pyrefly: ignore
        Coordinator.fetch_sub_module = self._noting(fetch)
        TransformerPolicy.whole = asked  # pyrefly: ignore

    def _noting(self, gather: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            found = gather(*args, **kwargs)
            there = sum(one.ds_numel for one in self.parameters if one.ds_status.name != "NOT_AVAILABLE")
            self.most[self.place] = max(self.most[self.place], there)
            return found

        return noted

    def record(self) -> dict[str, Any]:
        return {"all": self.every, "most": self.most, "whole": self.whole}


def prepare(name: str, rank: int) -> None:
    """Of each process of a run."""
    flat, build = Roller._flat, grpo_source.build_engine

    def told_flat(roller: Roller, found: Rollout) -> list[int]:
        return [*flat(roller, found), 0] if rank == 1 else []

    def mortal(*args: Any, **kwargs: Any) -> Any:
        inner, deaths = cast(TorchEngine, build(*args, **kwargs)), list(LOSSES[name])
        return Recovering(lambda: cast(Any, Mortal(inner, deaths)), args[1])

    def failing(self: TorchEngine, *args: Any) -> Any:
        if rank == 1 and self.weights_version == 1:
            raise RuntimeError("this process alone has failed")
        return generate(self, *args)

    Roller._flat = told_flat  # pyrefly: ignore
    if name in LOSSES:
        grpo_source.build_engine = mortal
    if name == "failing":
        generate, TorchEngine.generate = TorchEngine.generate, failing  # pyrefly: ignore


def work(folder: Path, name: str, rank: int, death: str | None) -> None:
    gathered = Gathered()
    prepare(name, rank)
    gathered.watch()
    run(folder, BOTH if name == "kept" else CASE, "zero3", death)
    if rank == 0:
        folder.with_suffix(".json").write_text(json.dumps(gathered.record()))


def started(place: Path, name: str, death: str | None = None) -> None:
    folder = place / name
    statuses = fork_group(lambda rank: work(folder, name, rank, death), place / f"{name}.log", count=2)
    (place / f"{name}.status.json").write_text(json.dumps(statuses))


def main(place: Path, names: list[str]) -> None:
    shared = place / "shared"
    if not shared.is_dir():
        shared.mkdir()
        alone = Case(CASE.recipe, CASE.shared, {})
        if any(fork_group(lambda _: run(shared, alone, "plain", None), place / "shared.log")):
            raise SystemExit((place / "shared.log").read_text()[-8000:])
    for name in names:
        shutil.copytree(shared / "stages", place / name / "stages")
        if name == "torn":  # the second rollout was finished, and what one process recorded of it is lost
            started(place, name, "whole")
            records = list((place / name).glob("stages/*-whole/rollouts/step-000001.rank1.json"))
            assert len(records) == 1, (place / f"{name}.log").read_text()[-8000:]
            records[0].unlink()
        started(place, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
