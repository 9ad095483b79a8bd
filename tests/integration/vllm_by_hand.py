"""The law's processor on batches that vLLM's scheduler would rarely make."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from rollouts.law import Law
from rollouts.vllm_engine.drawn import KEY
from rollouts.vllm_engine.processor import LawProcessor


def processor_by_hand() -> dict[str, Any]:
    """A guided sample of two rows: a step together, one with the rows apart, and one together after they were moved."""
    law = Law((2, 6), guidance_scale=2.0)
    made = LawProcessor(
        SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 8)), torch.device("cpu"), False
    )
    wanted = {"sample": "a", "law": law.to_dict(), "length": 3, "seed": 5, "forced": []}
    cond: list[int] = []
    uncond: list[int] = []
    for index, (stream, output) in enumerate({"cond": cond, "uncond": uncond}.items()):
        asked = SamplingParams(extra_args={KEY: wanted | {"streams": [stream]}})
        made.update_state(BatchUpdate(2, [], [(index, asked, [1], output)], []))
    logits = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    left = [made.apply(logits[0].clone())]
    cond.append(9)
    left.append(made.apply(logits[1].clone()))
    early = made.samples["a"].drawn.fault
    uncond.append(9)
    made.update_state(BatchUpdate(2, [], [], [(0, 1, MoveDirectionality.SWAP)]))
    left.append(made.apply(logits[2].clone()))
    (drawn,) = made.collect(["a"])
    mixes = [uncond + 2.0 * (cond - uncond) for uncond, cond in ((logits[0, 1], logits[0, 0]), logits[2])]
    exact = [float(mix[2:6].log_softmax(-1)[token - 2]) for mix, token in zip(mixes, drawn.tokens_S[:2], strict=True)]
    return {
        "together": [int(row.argmax()) for row in left[0]] == [int(drawn.tokens_S[0])] * 2,
        "apart": early, "left alone": bool(torch.equal(left[1], logits[1])), "undrawn": int(drawn.tokens_S[2]),
        "moved": [int(row.argmax()) for row in left[2]] == [int(drawn.tokens_S[1])] * 2,
        "gap": max(abs(a - b) for a, b in zip(exact, drawn.logp_S[:2].tolist(), strict=True)),
    }  # fmt: skip
