"""The law's processor on batches that vLLM's scheduler would rarely make."""

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F
from vllm import SamplingParams
from vllm import _custom_ops as ops
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from rollouts.kernels.native import load_kernels
from rollouts.law import Law
from rollouts.vllm_engine.cpu_kernels import LAYOUT
from rollouts.vllm_engine.drawn import KEY
from rollouts.vllm_engine.processor import LawProcessor


def gap_of_pages(page: int) -> float:
    """The kernel's error over a cache that vLLM itself has filled, pages of so many positions; heads 4 of 2."""
    lengths, size, scale = [page - 1, page, page + 20], 64, 0.2
    made = torch.Generator().manual_seed(0)
    keys = torch.randn(3, max(lengths), 2, size, generator=made)
    values = torch.randn(3, max(lengths), 2, size, generator=made)
    query = torch.randn(3, 4, size, generator=made)
    table, cache = torch.tensor([[3, 1], [5, 0], [2, 4]], dtype=torch.int32), torch.zeros(6, 2, page, 2 * size)
    key_part, value_part = cache.view(6, 2, 2 * page, size).chunk(2, dim=2)
    for n, length in enumerate(lengths):
        slots = torch.tensor([int(table[n, t // page]) * page + t % page for t in range(length - 1)])
        written = keys[n, : length - 1], values[n, : length - 1]
        ops.cpu_attn_reshape_and_cache(*written, key_part, value_part, slots, LAYOUT)
    last = torch.tensor(lengths) - 1
    out = torch.empty_like(query)
    new = keys[torch.arange(3), last], values[torch.arange(3), last]
    load_kernels().attend_paged(query, *new, cache, table, torch.tensor(lengths).int(), out, scale=scale)
    worst = 0.0
    for n, length in enumerate(lengths):
        q, k, v = query[n].unsqueeze(1), keys[n, :length].transpose(0, 1), values[n, :length].transpose(0, 1)
        exact = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).squeeze(1)
        worst = max(worst, float((out[n] - exact).abs().max()))
    return worst


def processor() -> LawProcessor:
    sizes = SimpleNamespace(get_vocab_size=lambda: 8)
    return LawProcessor(SimpleNamespace(model_config=sizes), torch.device("cpu"), False)


def shared_by_two() -> dict[str, Any]:
    """Samples of two engines in one vLLM: `a` is collected while `b` runs and `c` was given up, then `b`, whose row is
    still there."""
    made, law = processor(), Law((2, 6))
    added = []
    for index, name in enumerate("abc"):
        wanted = {"sample": name, "law": law.to_dict(), "length": 3, "seed": 5, "forced": [], "streams": ["cond"]}
        added.append((index, SamplingParams(extra_args={KEY: wanted}), [1], list[int]()))
    made.update_state(BatchUpdate(3, [], added, []))
    made.apply(torch.zeros(3, 8))
    made.update_state(BatchUpdate(2, [2], [], []))
    (one,) = made.collect(["a"])
    known = sorted(made.samples)
    made.apply(torch.zeros(2, 8))
    (other,) = made.collect(["b"])
    left = made.apply(torch.zeros(2, 8))
    try:
        made.collect(["a"])
    except RuntimeError as error:
        return {
            "drawn": [int(one.tokens_S[0]) >= 2, int(other.tokens_S[0]) >= 2], "known": known,
            "untouched": not left.any().item(), "unknown": str(error),
        }  # fmt: skip
    raise AssertionError("a sample was collected twice")


def processor_by_hand() -> dict[str, Any]:
    """A guided sample of two rows: a step together, one with the rows apart, and one together after they were moved."""
    law, made = Law((2, 6), guidance_scale=2.0), processor()
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
        "pages": {} if torch.cuda.is_available() else {page: gap_of_pages(page) for page in (32, 64, 128)},
        "together": [int(row.argmax()) for row in left[0]] == [int(drawn.tokens_S[0])] * 2,
        "apart": early, "left alone": bool(torch.equal(left[1], logits[1])), "undrawn": int(drawn.tokens_S[2]),
        "moved": [int(row.argmax()) for row in left[2]] == [int(drawn.tokens_S[1])] * 2,
        "shared": shared_by_two(),
        "gap": max(abs(a - b) for a, b in zip(exact, drawn.logp_S[:2].tolist(), strict=True)),
    }  # fmt: skip
