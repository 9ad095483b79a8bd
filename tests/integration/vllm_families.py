"""Each family's real class on a real vLLM, against the trainer and the torch engine; prints one JSON object.

`--compiled`: with compiled models. `--served`: by a server; `--devices`: by a server over two devices."""

import json
import os
import sys
from typing import Any

from rlmm.config.engines import VllmServerConfig
from rlmm.config.policy import Lora
from rlmm.config.sampling import Sampling, Written
from rlmm.policies.layout_io import spell_image
from rlmm.policies.responses import response_of
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.engines import build_engine
from rollouts.contract import Request
from rollouts.interleaved import generate_spans
from rollouts.law import Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Span
from tests.families.checkpoints import PROMPTS, WRITERS, peaked, requests
from tests.families.test_answers import picture
from tests.integration.vllm_requests import LAWS, agrees, change, gap, local

ROOM: dict[str, Any] = {"max_rows": 7, "max_prompt_tokens": 700}
ENGINES = {
    "--served": VllmServerConfig(**ROOM, kv_megabytes=32),
    "--devices": VllmServerConfig(**ROOM, kv_megabytes=32, tensor_parallel=2),
}
"""By what the program was told; else in this process."""
SERVED = next((word for word in sys.argv if word in ENGINES), None)
TEXTS = ["a", "two red circles and a very long blue line between them", 'render "HELLO"']


def family(name: str) -> dict[str, Any]:
    policy = peaked(name)
    policy.add_lora(Lora(rank=4, target_modules=("q_proj", "gate_proj")), seed=1)
    policy.model.eval()
    change(policy, 1)
    engine = build_engine(ENGINES[SERVED] if SERVED else local(**ROOM), policy)
    found: dict[str, Any] = {"agrees": [agrees(engine, policy)], "laws": {}, "workers": workers(engine)}
    change(policy, 2)
    found["agrees"].append(agrees(engine, policy))
    engine.sync(policy.named_weights(), 1)
    found["agrees"].append(agrees(engine, policy))
    asked = requests(policy, PROMPTS.get(name, TEXTS), source=source(policy))
    reference = TorchEngine(policy, num_layers=policy.sizes.num_hidden_layers)
    for law, settings in LAWS.items():
        span = Span("image", Law(policy.layout.image, **settings), policy.layout.grid.length)
        made = engine.generate(asked, [span])
        wanted = reference.generate(asked, [span])
        same = (made.ids == wanted.ids).float().mean()
        found["laws"][law] = {"gap": gap(policy, made), "same": float(same), "decided": int(made.target_mask.sum())}
    if name in WRITERS:
        found["thought"] = thought(engine, policy)
    engine.close()
    return found


def workers(engine: Any) -> int:
    """Processes of the server's model; 0 where there is no server."""
    return int(engine.engine.hosts[0].call("rollouts_devices")) if SERVED else 0


def source(policy: TransformerPolicy) -> list[int] | None:
    """A whole picture where its rows and columns are positions, too."""
    layout = policy.layout
    if not layout.family.startswith("glm_image"):
        return None
    return spell_image(layout, [11 * code for code in range(len(layout.grid.decided()))])


def thought(engine: Any, policy: TransformerPolicy) -> dict[str, Any]:
    """A text and the guided image after it, about a source image (of a server: where it is one of codes)."""
    spans = response_of(policy, Sampling(guidance_scale=2.0, thought=Written(length_limit=6, top_k=30)))
    shown = [[*policy.layout.grid.forced().values()]]
    if policy.pictures is not None:
        shown = [] if SERVED else policy.pictures.spell([picture(0)])
    asked = [
        Request(text, spans.streams(text, shown), (7, 8, 9), tuple(f"{text}/{i}" for i in range(3))) for text in TEXTS
    ]
    made = generate_spans(engine, policy.layout, asked, spans.spans)
    reference = TorchEngine(policy, num_layers=policy.sizes.num_hidden_layers)
    wanted = generate_spans(reference, policy.layout, asked, spans.spans)
    rows = (made.ids == wanted.ids).all(1).float().mean() if made.ids.shape == wanted.ids.shape else 0.0
    decided = {kind: int((made.target_mask & (made.span == i)).sum()) for i, kind in enumerate(("text", "image"))}
    return {"gap": gap(policy, made), "same": float(rows), **decided}


if __name__ == "__main__":
    if SERVED == "--devices":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # or two devices on one processor are refused
    print(json.dumps({name: family(name) for name in sys.argv[1:] if not name.startswith("--")}))
