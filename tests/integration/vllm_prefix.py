"""How many positions vLLM's model computes for groups of samples; prints one JSON object.

A program of its own: vLLM changes the process it lives in.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlmm.policies.causal import CausalPolicy
from rollouts.contract import SEEN, Request
from rollouts.law import Law
from rollouts.trajectory import Span
from rollouts.vllm_engine.engine import VllmEngine
from rollouts.vllm_engine.flat import FlatLlama
from rollouts.vllm_engine.host import BLOCK
from rollouts.vllm_engine.local import LocalHost
from rollouts.vllm_engine.plugin import two_stream_overrides
from tests.integration.vllm_requests import make_policy

GROUP, TOKENS = 8, 12
LENGTHS = (3 * BLOCK, 2 * BLOCK + 9)
"""Positions of the groups' prefixes: the first ends with a block, and its last position is computed for every sample,
whose logits it gives."""
Groups = Sequence[dict[str, tuple[int, ...]]]
"""The streams of each group."""


class Counted:
    """A vLLM and the positions that its model was given."""

    def __init__(self, policy: CausalPolicy, *, together: bool = False, embeds: bool = False, **sizes: Any) -> None:
        given: dict[str, Any] = {"max_rows": 64, "max_prompt_tokens": 4096, "kv_bytes": 16 << 20} | sizes
        overrides = two_stream_overrides(policy.layout) if together else {}
        with tempfile.TemporaryDirectory() as folder:
            policy.save(Path(folder))
            self.host = LocalHost(
                Path(folder), max_length=256, dtype="float32", overrides=overrides, embeds=embeds, **given
            )
        self.policy, self.positions = policy, 0
        self.engine = VllmEngine(policy.layout, [self.host], self.host.load, self._embedded if embeds else None)
        self.host.llm.apply_model(lambda model: model.register_forward_pre_hook(self._count, with_kwargs=True))
        self._count_flat()

    def _count(self, model: Any, arguments: Any, named: dict[str, Any]) -> None:
        self.positions += len(named["positions"])

    def _count_flat(self) -> None:
        """Steps that go past the model's modules."""
        call, ours = FlatLlama.__call__, self

        def counted(self: FlatLlama, ids_N: Tensor, position_N: Tensor) -> Tensor:
            ours.positions += len(ids_N)
            return call(self, ids_N, position_N)

        FlatLlama.__call__ = counted

    def _embedded(self, prefix: tuple[int, ...]) -> Tensor:
        ids_P = torch.tensor([token % SEEN for token in prefix])
        return self.policy.base.get_input_embeddings()(ids_P).detach()

    def free_blocks(self) -> list[int]:
        """In the order in which they will be handed out."""
        scheduler = self.host.llm.llm_engine.engine_core.engine_core.scheduler
        return [
            block.block_id for block in scheduler.kv_cache_manager.block_pool.free_block_queue.get_all_free_blocks()
        ]

    def prefilled(self, groups: Groups, **law: Any) -> int:
        """Positions of prompts that were computed: all but one a row for each token after the first."""
        asked = [
            Request(f"{g}", streams, tuple(range(g * GROUP, (g + 1) * GROUP)), tuple(f"{g}/{s}" for s in range(GROUP)))
            for g, streams in enumerate(groups)
        ]
        span, before = Span("image", Law(self.policy.layout.image, **law), TOKENS), self.positions
        rows = len(asked) * GROUP * (len(span.law.streams()) // self.host.room.streams)
        self.engine.generate(asked, [span])
        return self.positions - before - rows * (TOKENS - 1)


def once(groups: Groups, streams: Sequence[str]) -> int:
    """Positions where the full blocks of each prefix are computed for the group's first sample alone."""
    lengths = [len(group[name]) for group in groups for name in streams]
    return sum(length + (GROUP - 1) * (length - held(length)) for length in lengths)


def found_again(groups: Groups, streams: Sequence[str]) -> int:
    """Positions where the full blocks of each prefix were there before."""
    return sum(GROUP * (len(group[name]) - held(len(group[name]))) for group in groups for name in streams)


def held(length: int) -> int:
    """Positions of a prefix that a later sample finds: full blocks, without the last position."""
    return (length - 1) // BLOCK * BLOCK


def prefixes(policy: CausalPolicy, first: int, *lengths: int) -> list[tuple[int, ...]]:
    """Unlike from their first word on, so that none finds another's."""
    layout = policy.layout
    words = [token for token in range(*layout.text) if token not in layout.given()]
    empty = len(layout.prefix([]))
    made = []
    for at, length in enumerate(lengths, first):
        made.append(layout.prefix([words[(at + i * i) % len(words)] for i in range(length - empty)]))
    return made


def measure(counted: Counted, groups: Groups, streams: Sequence[str], scale: float) -> dict[str, list[int]]:
    """A rollout after a sync, the same again, and the same after a further sync; `streams`: the first of each row."""
    found = []
    for version in (1, None, 2):
        if version is not None:
            counted.engine.sync(counted.policy.named_weights(), version)
        found.append(counted.prefilled(groups, guidance_scale=scale))
    fresh, again = once(groups, streams), found_again(groups, streams)
    return {"computed": found, "wanted": [fresh, again, fresh]}


def main() -> None:
    plain, nulls = make_policy(lora=False), make_policy(lora=False, null_token=True)
    alone: Groups = [{"cond": ids} for ids in prefixes(plain, 0, *LENGTHS)]
    others = prefixes(plain, len(LENGTHS), BLOCK + 3, 2 * BLOCK + 1)
    pairs: Groups = [{**group, "uncond": ids} for group, ids in zip(alone, others, strict=True)]
    token: Groups = [
        {"cond": ids, "uncond": nulls.layout.unconditional(ids) or ()} for ids in prefixes(nulls, 0, *LENGTHS)
    ]
    seen: Groups = [{"cond": (group["cond"][0], group["cond"][1] + SEEN, *group["cond"][2:])} for group in alone]
    found: dict[str, Any] = {}
    # Fewer slots than a group has rows: its last samples start when the first have ended.
    counted = Counted(plain, max_rows=6)
    found["unguided"] = measure(counted, alone, ["cond"], 1.0)
    found["paired waves"] = measure(counted, pairs, ["cond", "uncond"], 3.0)
    returned = counted.free_blocks()
    counted.host.forget()
    found["free blocks"] = {"returned": returned, "forgotten": counted.free_blocks()}
    counted.host.close()
    counted = Counted(nulls, together=True, max_rows=3)
    found["two streams"] = measure(counted, token, ["cond"], 3.0)
    counted.host.close()
    counted = Counted(plain, embeds=True)
    found["embeddings"] = measure(counted, seen, ["cond"], 1.0)
    counted.host.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
