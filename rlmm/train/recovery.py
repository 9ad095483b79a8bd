"""A rollout engine that is built anew when what it samples with is lost."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rlmm.policies.parts import several_processes
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.heart import phase
from rlmm.train.processes import everywhere, gather
from rlmm.train.sync import compare, fingerprint, handed
from rollouts.contract import Engine, EngineLost, Request
from rollouts.trajectory import Span, Trajectory

T = TypeVar("T")
log = logging.getLogger(__name__)


class PutOff(EngineLost):
    """The engine is lost, and what it was asked for is to be asked again once all processes have come to `regain`."""


class Recovering:
    """Once for every version of the weights: a lost engine is built again, takes the policy's weights, and repeats the
    call. Its samples are functions of their seeds, so nothing is lost and nothing changes. A second loss is raised.

    Where weights are in parts, one on each process, to read them is a collective, and processes may make different
    numbers of calls to `generate`. So there a call raises PutOff, and its engine is built again in `regain`, which all
    processes call when they have drawn. `sync` and `fingerprint` are called by all, and regain by themselves.
    """

    def __init__(self, build: Callable[[], Engine], policy: TransformerPolicy) -> None:
        self.build, self.policy = build, policy
        self.engine = build()
        self.version = 0
        self._rebuilt_at: int | None = None
        self._lost: EngineLost | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    @property
    def reads_policy(self) -> bool:
        return self.engine.reads_policy

    @property
    def takes_adapters(self) -> bool:
        return self.engine.takes_adapters

    @property
    def together(self) -> bool:
        """Whether all processes must know of a loss."""
        return several_processes() and self.policy.in_parts

    def generate(self, requests: Sequence[Request], spans: Sequence[Span]) -> Trajectory:
        made = self._unless_lost(lambda: self.engine.generate(requests, spans))
        if made is None and self.together:
            raise PutOff("the rollout engine was lost, and is started again by all processes together")
        if made is None:
            self.regain()
            made = self._unless_lost(lambda: self.engine.generate(requests, spans))
        assert made is not None, "a second loss is raised"
        return made

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version, handed = version, iter(weights)
        self._unless_lost(lambda: self.engine.sync(handed, version))
        if self.together:
            _pass_over(handed)  # an engine that was lost on the way left some to gather
        self.regain()

    def fingerprint(self) -> str:
        found = self._unless_lost(lambda: self.engine.fingerprint())
        self.regain()
        found = self._unless_lost(lambda: self.engine.fingerprint()) if found is None else found
        assert found is not None, "a second loss is raised"
        return found

    def regain(self) -> bool:
        """Start the engine again where it was lost. Where weights are in parts all processes call this, and pass over
        the weights if one has lost its engine. Whether one has; what was put off is then to be asked for again."""
        everyone = self.together
        if not any(gather(self._lost is not None) if everyone else [self._lost is not None]):
            return False
        for work in (self._rebuild, self._take, self._compare):
            everywhere(work) if everyone else work()
        self._lost = None
        return True

    def close(self) -> None:
        self.engine.close()

    def _unless_lost(self, call: Callable[[], T]) -> T | None:
        """What the call gives. None, and the loss noted, where the engine is lost for the first time."""
        try:
            return call()
        except EngineLost as error:
            if self._rebuilt_at == self.version:
                raise EngineLost(
                    f"the rollout engine was lost twice with the same weights (version {self.version}); the last time: "
                    f"{error}\nSee whether the machine has the memory that its settings ask for (engine.kv_megabytes, "
                    "engine.max_rows), and go on with the same command"
                ) from error
            self._lost = error
            return None

    def _rebuild(self) -> None:
        if self._lost is None:
            return
        self._rebuilt_at = self.version
        log.warning("the rollout engine was lost and is started again: %s", self._lost)
        with phase("engine is started again", patient=True):
            self.engine.close()
            self.engine = self.build()

    def _take(self) -> None:
        """The policy's weights, by the engine that was built again; the others gather them with it."""
        weights = iter(handed(self.policy, self.engine))
        try:
            if self._lost is not None:
                self._unless_lost(lambda: self.engine.sync(weights, self.version))
        finally:
            _pass_over(weights if self.together else ())

    def _compare(self) -> None:
        """An engine that was built again is believed by its fingerprint, too. The trainer's is taken by all where
        weights are in parts."""
        mine = fingerprint(self.policy, self.engine)
        if self._lost is not None:
            theirs = self._unless_lost(lambda: self.engine.fingerprint())
            assert theirs is not None, "a second loss is raised"
            compare(mine, theirs, self.version)


def regained(engine: Engine) -> bool:
    """Whether an engine was lost, on this process or another, and is there again: see `Recovering.regain`."""
    return isinstance(engine, Recovering) and engine.regain()


def _pass_over(weights: Iterable[tuple[str, Tensor]]) -> None:
    for _ in weights:
        pass
