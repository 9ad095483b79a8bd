"""A decode step over vLLM's paged cache, against attention over the same keys and values laid end to end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rollouts.kernels.building import NoKernels
from rollouts.kernels.native import PAGED_HEAD_SIZES, Kernels, load_kernels

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    try:
        return load_kernels()
    except NoKernels as error:
        pytest.skip(str(error))


def laid_out(keys_SFD: Tensor, values_SFD: Tensor, pages: list[int], cache_BFSX: Tensor) -> None:
    """Write positions into pages: keys [D, positions], then values [positions, D]."""
    page, size = cache_BFSX.shape[2], keys_SFD.shape[2]
    for head in range(keys_SFD.shape[1]):
        for t in range(0, len(keys_SFD), page):
            flat = cache_BFSX[pages[t // page], head].view(-1)
            keys_SD, values_SD = keys_SFD[t : t + page, head], values_SFD[t : t + page, head]
            flat[: page * size].view(size, page)[:, : len(keys_SD)] = keys_SD.T
            flat[page * size :].view(page, size)[: len(values_SD)] = values_SD


def attended(q_ED: Tensor, keys_SFD: Tensor, values_SFD: Tensor, scale: float) -> Tensor:
    q, k, v = (part.double() for part in (q_ED.unsqueeze(1), keys_SFD.transpose(0, 1), values_SFD.transpose(0, 1)))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).squeeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", PAGED_HEAD_SIZES)
@pytest.mark.parametrize("page", [32, 64])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_it_is_attention_over_the_pages(
    kernels: Kernels, dtype: torch.dtype, size: int, page: int, heads: tuple[int, int]
) -> None:
    lengths, (query_heads, kv_heads), scale = [1, 31, 32, 33, 64, 65, 130, 200], heads, 0.3
    torch.manual_seed(0)
    widest = -(-max(lengths) // page)
    order = torch.randperm(len(lengths) * widest) + 1
    table_NP = order.view(len(lengths), widest).int()
    cache = torch.full((len(order) + 1, kv_heads, page, 2 * size), torch.nan, dtype=dtype)  # unread where not filled
    before = [(torch.randn(2, n, kv_heads, size).to(dtype)) for n in lengths]
    fused = torch.randn(len(lengths), (query_heads + 2 * kv_heads) * size).to(dtype)  # rows lie apart in it
    q, k, v = fused.split([query_heads * size, kv_heads * size, kv_heads * size], -1)
    q_NED, k_NFD, v_NFD = (part.view(len(lengths), -1, size) for part in (q, k, v))
    for n, (keys, values) in enumerate(before):
        keys[-1], values[-1] = k_NFD[n], v_NFD[n]
        laid_out(keys[:-1], values[:-1], table_NP[n].tolist(), cache)
    out_NED = torch.empty(len(lengths), query_heads, size, dtype=dtype)
    kernels.attend_paged(q_NED, k_NFD, v_NFD, cache, table_NP, torch.tensor(lengths).int(), out_NED, scale=scale)
    for n, (keys, values) in enumerate(before):
        exact = attended(q_NED[n], keys, values, scale)
        within = 4e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out_NED[n].double(), exact, atol=within, rtol=within)
    expected = torch.full_like(cache, torch.nan)
    for n, (keys, values) in enumerate(before):
        laid_out(keys, values, table_NP[n].tolist(), expected)
    assert torch.equal(cache.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [1, -1])
def test_scores_may_rise_and_fall_by_hundreds(kernels: Kernels, dtype: torch.dtype, way: int) -> None:
    """What was summed before a higher score counts for less and less; e to the power of the difference is infinite."""
    length, size = 150, 64
    torch.manual_seed(0)
    rise_S11 = torch.linspace(-1, 1, length).mul(way).view(-1, 1, 1)
    keys, values = (rise_S11 * torch.ones(length, 1, size)).to(dtype), torch.randn(length, 1, size).to(dtype)
    q_NED, pages = torch.full((1, 1, size), 6.0).to(dtype), [3, 1, 2, 5, 4]
    cache = torch.zeros(6, 1, 32, 2 * size, dtype=dtype)
    laid_out(keys[:-1], values[:-1], pages, cache)
    out_NED = torch.empty_like(q_NED)
    lengths = torch.tensor([length]).int()
    kernels.attend_paged(q_NED, keys[-1:], values[-1:], cache, torch.tensor([pages]).int(), lengths, out_NED, scale=1.0)
    exact = attended(q_NED[0], keys, values, 1.0)
    within = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out_NED[0].double(), exact, atol=within, rtol=within)


THREADS = """
import os, sys
import torch
from rollouts.kernels.native import load_kernels
torch.manual_seed(0)
for rows in (1, 2, 3, 7):
    q, k, v = torch.randn(rows, 6, 64), torch.randn(rows, 2, 64), torch.randn(rows, 2, 64)
    cache, table = torch.randn(1 + rows * 3, 2, 32, 128), torch.randperm(rows * 3).view(rows, 3).int() + 1
    length, out = torch.randint(1, 97, (rows,)).int(), torch.empty_like(q)
    load_kernels().attend_paged(q, k, v, cache, table, length, out, scale=0.3)
    sys.stdout.buffer.write(out.numpy().tobytes() + cache.numpy().tobytes())
print(len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0, file=sys.stderr)
"""


def test_any_number_of_threads_gives_the_same_bits(kernels: Kernels) -> None:
    """With fewer rows than threads each key head is a task of its own."""
    made = [
        subprocess.run(
            [sys.executable, "-c", THREADS], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(count)},
            capture_output=True, check=True,
        )
        for count in (1, 2)
    ]  # fmt: skip
    assert made[0].stdout == made[1].stdout and len(made[0].stdout) > 13 * 6 * 64 * 4
    if sys.platform == "linux":
        assert int(made[1].stderr.split()[-1]) > int(made[0].stderr.split()[-1])  # there were two


@pytest.mark.parametrize("size", [40, 48, 72, 136])
def test_a_head_size_it_lacks_is_named(kernels: Kernels, size: int) -> None:
    q = torch.zeros(1, 1, size)
    cache, one = torch.zeros(2, 1, 32, 2 * size), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"no head size {size} for pages; known: .32"):
        kernels.attend_paged(q, q, q, cache, one.view(1, 1), one, torch.empty_like(q), scale=1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked of Linux")
def test_memory_on_large_pages_holds_zeros_and_can_be_written(kernels: Kernels) -> None:
    memory = torch.ones(1 << 22)  # not zeros, so that pages that were not given back show
    kernels.zeros_anew(memory.untyped_storage())
    page = 4096 // 4
    assert not memory[page:-page].any()
    memory.fill_(2)
    assert memory.eq(2).all()


@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_of_bfloat16_is_within_one_rounding(kernels: Kernels, residual: bool) -> None:
    torch.manual_seed(0)
    x, more, weight = torch.randn(5, 64).bfloat16(), torch.randn(5, 64).bfloat16(), torch.rand(64).bfloat16()
    total = x + more if residual else x.clone()
    exact = F.rms_norm(total.float(), (64,), weight.float(), 1e-5)
    into = more if residual else torch.empty_like(x)
    kernels.add_norm(x, more if residual else None, weight, into, 1e-5)
    assert torch.equal(x, total)
    torch.testing.assert_close(into.float(), exact, atol=0, rtol=2**-8)
