"""What a real vLLM does on a GPU behind the Engine contract, measured; prints one JSON object a part, `{"part": ...}`.

`python -m tests.gpu.vllm_program PART... [--compiled]`. A program of its own: vLLM changes the process it lives in. The
policy stays on the CPU but in the stages, so that every figure is one device against another.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.compilation.counter import compilation_counter

from rlmm.train.engines import build_engine
from rollouts.vllm_engine import plugin
from tests.integration import vllm_program as everywhere
from tests.integration.vllm_requests import agrees, change, gap, local, make_policy, sample, under_laws, writing
from tests.integration.vllm_stages import stages


def contract() -> dict[str, Any]:
    """Laws, a text and its image, syncs and faults of one engine, guided samples in waves."""
    policy = make_policy(lora=True)
    change(policy, 1)
    engine = build_engine(local(max_rows=7, max_prompt_tokens=130), policy)
    found = {
        "parts": everywhere.parts(engine),
        "graphs": compilation_counter.num_cudagraph_captured,
        "laws": under_laws(engine, policy),
        "writing": writing(engine, policy),
        "syncs": everywhere.syncs(engine, policy),
        "faults": everywhere.faults(engine, policy),
    }
    engine.close()
    return found


def others() -> dict[str, Any]:
    """Two streams in a request, tied embeddings, frequencies, and memory that is too small and too large."""
    wide = make_policy(lora=False, hidden=512)
    return {
        "two streams": everywhere.two_streams(),
        "tied": everywhere.tied_and_gridded(),
        "frequencies": everywhere.frequencies(),
        "small cache": everywhere.refusal(lambda: build_engine(local(kv_megabytes=1), wide)),
        "large cache": everywhere.refusal(lambda: build_engine(local(kv_megabytes=1 << 24), wide)),
    }


def sleeping() -> dict[str, Any]:
    """Memory that a sleeping vLLM gives back, and that it wakes with the weights it had. `free`: MiB of the device
    awake, asleep, awake and closed."""
    policy = make_policy(lora=False, hidden=512)
    engine: Any = build_engine(local(max_rows=7, sleep=True, kv_megabytes=8192), policy)

    def free() -> int:
        return torch.cuda.mem_get_info()[0] >> 20

    found: dict[str, Any] = {"agrees at first": agrees(engine, policy), "free": [free()]}
    found["gaps"] = [gap(policy, sample(engine, policy, {"guidance_scale": 2.0})) for _ in range(2)]
    found["free"].append(free())
    found["asleep"] = engine.hosts[0].llm.llm_engine.is_sleeping()
    found["agrees"] = agrees(engine, policy)
    found["awake"] = not engine.hosts[0].llm.llm_engine.is_sleeping()
    found["free"].append(free())
    sample(engine, policy, {})
    change(policy, 6)
    engine.sync(policy.named_weights(), 10)
    found["gap after sync"] = gap(policy, sample(engine, policy, {}))
    found["agrees after sync"] = agrees(engine, policy)
    engine.close()
    found["free"].append(free())
    return found


def stage() -> list[list[dict[str, float]]]:
    """The GRPO stage under three engines of this process, trained on the GPU."""
    inside = local(max_rows=16).model_dump()
    with tempfile.TemporaryDirectory() as folder:
        return stages(Path(folder), [{"kind": "torch"}, inside, inside | {"sleep": True}])


def served() -> list[list[dict[str, float]]]:
    """The GRPO stage under the torch engine and under a server, sent weights in a folder and by gloo."""
    server = {"kind": "vllm_server", "kv_megabytes": 32, "max_rows": 16}
    with tempfile.TemporaryDirectory() as folder:
        return stages(Path(folder), [{"kind": "torch"}, server, server | {"transfer": "gloo"}])


PARTS: dict[str, Callable[[], Any]] = {
    "contract": contract, "others": others, "sleeping": sleeping, "stage": stage, "served": served,
}  # fmt: skip

if __name__ == "__main__":
    plugin.register()
    for name in sys.argv[1:]:
        if name in PARTS:
            print(json.dumps({name: PARTS[name]()}), flush=True)
