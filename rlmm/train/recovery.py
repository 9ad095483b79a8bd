"""A rollout engine that is built anew when what it samples with is lost."""

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.heart import phase
from rollouts.contract import Engine, EngineLost, Request
from rollouts.trajectory import Span, Trajectory

log = logging.getLogger(__name__)


class Recovering:
    """Once for every version of the weights: a lost engine is built again, takes the policy's weights, and repeats the
    call. Its samples are functions of their seeds, so nothing is lost and nothing changes. A second loss is raised.
    """

    def __init__(self, build: Callable[[], Engine], policy: TransformerPolicy) -> None:
        self.build, self.policy = build, policy
        self.engine = build()
        self.version = 0
        self._rebuilt_at: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    def generate(self, requests: Sequence[Request], spans: Sequence[Span]) -> Trajectory:
        try:
            return self.engine.generate(requests, spans)
        except EngineLost as error:
            self._rebuild(error)
            return self.engine.generate(requests, spans)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = version
        try:
            self.engine.sync(weights, version)
        except EngineLost as error:
            self._rebuild(error)

    def fingerprint(self) -> str:
        try:
            return self.engine.fingerprint()
        except EngineLost as error:
            self._rebuild(error)
            return self.engine.fingerprint()

    def close(self) -> None:
        self.engine.close()

    def _rebuild(self, error: EngineLost) -> None:
        if self._rebuilt_at == self.version:
            raise EngineLost(
                f"the rollout engine was lost twice with the same weights (version {self.version}); the last time: "
                f"{error}\nSee whether the machine has the memory that its settings ask for (engine.kv_megabytes, "
                "engine.max_rows), and go on with the same command"
            ) from error
        self._rebuilt_at = self.version
        log.warning("the rollout engine was lost and is started again: %s", error)
        with phase("engine is started again", patient=True):
            self.engine.close()
            self.engine = self.build()
        self.engine.sync(self.policy.named_weights(), self.version)
