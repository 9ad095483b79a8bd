"""What a real vLLM does behind the Engine contract, measured; prints one JSON object. `--compiled`: with a compiled
model.

A program of its own: vLLM changes the process it lives in (threads, memory policy, a process group).
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from scipy.stats import chisquare
from torch import Tensor
from vllm import ModelRegistry
from vllm.compilation.counter import compilation_counter
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import _cached_get_attn_backend

from rlmm.config.policy import NewPolicy
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.llama import build
from rlmm.train.engines import build_engine
from rollouts.contract import Request
from rollouts.kernels.native import Kernels
from rollouts.law import Law
from rollouts.trajectory import Span
from rollouts.vllm_engine import plugin
from rollouts.vllm_engine.engine import VllmEngine
from rollouts.vllm_engine.local import LocalHost
from tests.families.checkpoints import peaked
from tests.integration.vllm_by_hand import processor_by_hand
from tests.integration.vllm_requests import (
    agrees,
    change,
    gap,
    local,
    make_policy,
    requests,
    sample,
    under_laws,
    writing,
)
from tests.integration.vllm_stages import stages, stock_adapter


def refusal(call: Callable[[], Any]) -> str:
    """The type and text of the error, empty where there is none."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def half(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return (pair for pair in weights if "layers.1.mlp" not in pair[0])


def broken_off(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """In the middle of matrices that vLLM joins into one."""
    yield from islice(weights, 3)
    raise RuntimeError("the trainer is gone")


def parts(engine: Any) -> list[str]:
    """The classes of vLLM's attention, norms and gates."""

    def of(model: torch.nn.Module) -> set[str]:
        layers = [layer for layer in model.modules() if isinstance(layer, Attention)]
        others = [layer for layer in model.modules() if isinstance(layer, RMSNorm | SiluAndMul)]
        return {type(layer.impl).__name__ for layer in layers} | {type(layer).__name__ for layer in others}

    (found,) = engine.hosts[0].llm.apply_model(of)
    return sorted(found)


def syncs(engine: Any, policy: CausalPolicy) -> dict[str, Any]:
    found: dict[str, Any] = {"at the start": agrees(engine, policy)}
    change(policy, 2)
    stale = sample(engine, policy, {})
    found["skipped"] = {
        "agrees": agrees(engine, policy),
        "gap": gap(policy, stale),
        "version": stale.weights_version,
    }
    engine.sync(policy.named_weights(), 7)
    fresh = sample(engine, policy, {})
    found["done"] = {
        "agrees": agrees(engine, policy),
        "gap": gap(policy, fresh),
        "version": fresh.weights_version,
    }
    before = engine.fingerprint()
    change(policy, 3)
    found["later change leaks in"] = engine.fingerprint() != before
    engine.sync(half(policy.named_weights()), 8)
    found["half"] = agrees(engine, policy)
    engine.sync(policy.named_weights(), 9)
    found["after half"] = {"agrees": agrees(engine, policy), "gap": gap(policy, sample(engine, policy, {}))}
    change(policy, 4)
    found["broken off"] = refusal(lambda: engine.sync(broken_off(policy.named_weights()), 10))
    engine.sync(policy.named_weights(), 11)
    found["after a break"] = {"agrees": agrees(engine, policy), "gap": gap(policy, sample(engine, policy, {}))}
    return found


def faults(engine: Any, policy: CausalPolicy) -> dict[str, Any]:
    law = Law(policy.layout.image)
    span, (first, *_) = Span("image", law, policy.layout.grid.length), requests(policy)
    guided = Span("image", Law(policy.layout.image, guidance_scale=2.0), policy.layout.grid.length)
    lacking = Request("lacking", {"cond": first.streams["cond"]}, (1,), ("x",))
    long = Request("long", {"cond": tuple([9] * 250)}, (1,), ("x",))
    found: dict[str, Any] = {
        "two spans": refusal(lambda: engine.generate([first], [span, span])),
        "no stream": refusal(lambda: engine.generate([lacking], [guided])),
        "too long": refusal(lambda: engine.generate([long], [span])),
        "nothing": refusal(lambda: engine.generate([], [span])),
    }
    (host,) = engine.hosts
    room, host.room = (
        host.room,
        replace(host.room, rows=100, prompt_tokens=10_000),
    )
    found["parted"] = refusal(lambda: sample(engine, policy, {"guidance_scale": 2.0}))
    host.room = room
    found["gap after"] = gap(policy, sample(engine, policy, {"guidance_scale": 2.0}))
    return found


def tied_and_gridded() -> dict[str, Any]:
    policy = make_policy(lora=False, tied=True, row_ends=True)
    engine = build_engine(local(max_rows=16), policy)
    start = agrees(engine, policy)
    change(policy, 4)
    skipped = agrees(engine, policy)
    engine.sync(policy.named_weights(), 1)
    made, grid = sample(engine, policy, {"top_k": 5}), policy.layout.grid
    ends = made.ids[:, grid.cols :: grid.stride]
    found = {
        "agrees": [start, skipped, agrees(engine, policy)],
        "gap": gap(policy, made),
        "row ends forced": set(ends.flatten().tolist()) == {grid.row_end},
        "decided": made.target_mask.sum(1).unique().tolist(),
        "silent elsewhere": bool((made.sampler_logp[~made.target_mask] == 0).all()),
    }
    engine.close()
    return found


def two_streams() -> dict[str, Any]:
    """Guided samples in one request of a model that carries both streams."""
    policy = make_policy(lora=True, row_ends=True, null_token=True)
    law = Law(policy.layout.image, guidance_scale=3.0)
    engine = build_engine(local(max_rows=4), policy, law)
    assert isinstance(engine, VllmEngine)
    start = agrees(engine, policy)
    change(policy, 4)
    skipped = agrees(engine, policy)
    engine.sync(policy.named_weights(), 1)
    found = {
        "streams": engine.hosts[0].room.streams,
        "agrees": [start, skipped, agrees(engine, policy)],
        "laws": under_laws(engine, policy),
    }
    engine.close()
    return found


def frequencies() -> dict[str, float]:
    """How likely counts of the 64 sequences as far from the exact law as vLLM's are; and, so that the test is known to
    see a wrong law, how likely under the law without guidance."""
    policy = build(
        NewPolicy(hidden_size=64, num_layers=1, num_heads=2, intermediate_size=96), num_codes=4, grid=(1, 3), seed=2
    )
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(8)
    policy.model.eval()
    engine = build_engine(local(max_rows=64), policy)
    prefix = policy.layout.prefix(policy.encode_prompt("ab"))
    streams = {"cond": prefix, "uncond": policy.layout.prefix(policy.layout.null([]))}
    seeds = tuple(range(3000))
    request = Request("ab", streams, seeds, tuple(map(str, seeds)))
    law = Law(policy.layout.image, guidance_scale=2.5, temperature=1.5)
    made = engine.generate([request], [Span("image", law, 3)])
    engine.close()
    low = policy.layout.image[0]
    place_S = torch.tensor([16, 4, 1])
    count_N = torch.bincount(((made.ids - low) * place_S).sum(1), minlength=64)
    every_NS = low + torch.cartesian_prod(*[torch.arange(4)] * 3)

    def likelihood(law: Law) -> float:
        rows = made.rows(torch.arange(64))
        asked = replace(rows, ids=every_NS, spans=(Span("image", law, 3),))
        with torch.no_grad():
            p_N = policy.log_probs(asked).logp_BS.double().sum(1).exp()
        return float(chisquare(count_N.numpy(), (p_N / p_N.sum() * len(seeds)).numpy()).pvalue)

    return {"the law": likelihood(law), "another": likelihood(replace(law, guidance_scale=1.0))}


def sleeping(engine: Any, policy: CausalPolicy) -> dict[str, Any]:
    """The order of sleep and wake; this platform pauses vLLM and empties its cache, and keeps the memory."""
    config = local(max_rows=7, sleep=True)
    found: dict[str, Any] = {"refused": refusal(lambda: build_engine(config, policy))}
    (host,) = engine.hosts
    host.sleep = True
    found["gaps"] = [gap(policy, sample(engine, policy, {"guidance_scale": 2.0})) for _ in range(2)]
    found["asleep"] = host.llm.llm_engine.is_sleeping()
    found["agrees"] = agrees(engine, policy)
    found["awake"] = not host.llm.llm_engine.is_sleeping()
    sample(engine, policy, {})
    change(policy, 6)
    engine.sync(policy.named_weights(), 10)
    found["gap after sync"] = gap(policy, sample(engine, policy, {}))
    return found


def halved(folder: Path) -> dict[str, Any]:
    """A stage in bfloat16, and one whose second sync does not take place."""
    kinds, load, done = [local(max_rows=16).model_dump()], LocalHost.load, list[None]()

    def only_once(host: LocalHost, weights: Iterator[tuple[str, Tensor]]) -> None:
        done.append(None)
        if len(done) == 1:
            load(host, weights)

    found: dict[str, Any] = {"rows": stages(folder / "synced", kinds, precision="bfloat16")[0]}
    with patch.object(LocalHost, "load", only_once):
        found["skipped"] = refusal(lambda: stages(folder / "skipped", kinds, precision="bfloat16"))
    return found | {"syncs": len(done)}


def main() -> None:
    plugin.MODELS["RlmmAlias"] = "vllm.model_executor.models.llama:LlamaForCausalLM"
    plugin.register()
    found: dict[str, Any] = {"registered": "RlmmAlias" in ModelRegistry.get_supported_archs()}
    found["by hand"] = processor_by_hand()
    policy = make_policy(lora=True)
    change(policy, 1)
    # An odd number of rows, and a prefill too small for all prompts: guided samples fit only in waves.
    engine = build_engine(local(max_rows=7, max_prompt_tokens=130), policy)
    found["parts"] = parts(engine)
    found["compiled models"] = compilation_counter.num_aot_compiles + compilation_counter.num_aot_artifacts_loaded
    with patch.object(Kernels, "attend_paged", autospec=True, side_effect=Kernels.attend_paged) as steps:
        found["laws"] = under_laws(engine, policy)
    found["kernel steps"] = steps.call_count
    found["writing"] = writing(engine, policy)
    found["syncs"] = syncs(engine, policy)
    found["faults"] = faults(engine, policy)
    found["sleep"] = sleeping(engine, policy)
    engine.close()
    found["frequencies"] = frequencies()
    found["group left"] = torch.distributed.is_initialized()
    wide = make_policy(lora=False, hidden=512)
    found["small cache"] = refusal(lambda: build_engine(local(kv_megabytes=1), wide))
    found["large cache"] = refusal(lambda: build_engine(local(kv_megabytes=1 << 24), wide))
    found["tied"] = tied_and_gridded()
    found["two streams"] = two_streams()
    with tempfile.TemporaryDirectory() as folder:
        kinds = [local(max_rows=16).model_dump(), {"kind": "torch"}]
        AttentionBackendEnum.CPU_ATTN.clear_override()  # stock vLLM has its own kernels
        _cached_get_attn_backend.cache_clear()
        op_registry_oot.clear()
        stock = {"llama": make_policy(lora=False)} | {name: peaked(name) for name in ("simplear", "blip3o_next")}
        found["stock adapter"] = {name: stock_adapter(policy, Path(folder) / name) for name, policy in stock.items()}
        found["stage"] = stages(Path(folder), kinds)
        found["bfloat16"] = halved(Path(folder))
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
