"""What LlamaGen's published weights compute, under their published names and in their published order of channels.

Plain functions of a dictionary of tensors, for comparison with the classes here (facts: fixtures/families).
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def random_checkpoint(
    folder: Path, *, width: int = 768, layers: int = 2, grid: int = 2, caption: int | None = None
) -> tuple[Path, Path]:
    """Files of a small model of published width, laid out as the authors' training script saves them. `caption`: the
    width of T5's features, of a text-conditional one."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float = 0.05) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    condition = {"cls_embedding.embedding_table.weight": drawn(1001, width, scale=1)}
    if caption is not None:
        condition = {
            "cls_embedding.cap_proj.fc1.weight": drawn(width, caption, scale=1),
            "cls_embedding.cap_proj.fc2.weight": drawn(width, width),
            "cls_embedding.uncond_embedding": drawn(120, caption, scale=1),
        }
    body = {
        **condition,
        "tok_embeddings.weight": drawn(16384, width, scale=1),
        "norm.weight": 1 + drawn(width),
        "output.weight": drawn(16384, width),
    }
    for layer in range(layers):
        shapes = {
            "attention.wqkv": (3 * width, width), "attention.wo": (width, width), "feed_forward.w1": (2048, width),
            "feed_forward.w3": (2048, width), "feed_forward.w2": (width, 2048),
        }  # fmt: skip
        body |= {f"layers.{layer}.{name}.weight": drawn(*shape) for name, shape in shapes.items()}
        body |= {f"layers.{layer}.{name}.weight": 1 + drawn(width) for name in ("attention_norm", "ffn_norm")}
    files = folder / "c2i_B.pt", folder / "vq.pt"
    body["freqs_cis"] = torch.zeros(1 + grid * grid, 32, 2)
    torch.save({"model": body, "steps": 3, "args": argparse.Namespace(gpt_model="GPT-B")}, files[0])
    torch.save({"model": _random_network(drawn)}, files[1])
    return files


def logits(weights: Weights, class_id: int, codes: list[int], heads: int, grid: int) -> Tensor:
    """[1 + codes, 16384]: what each position says of the next code, behind a class."""
    prefix = weights["cls_embedding.embedding_table.weight"][[class_id]]
    return _logits(weights, prefix, torch.ones(1).bool(), codes, heads, grid)


def text_logits(weights: Weights, features: Tensor, codes: list[int], heads: int, grid: int, null: bool) -> Tensor:
    """[1 + codes, 16384], behind a prompt whose T5 features are [n, D]: 120 places, of which the last n are seen, with
    the features in them or, in the unconditional row, what was learned for those places."""
    width = len(weights["cls_embedding.uncond_embedding"])
    seen = torch.arange(width) >= width - len(features)
    placed = F.pad(features, (0, 0, width - len(features), 0))
    placed = weights["cls_embedding.uncond_embedding"] if null else placed
    inner = F.gelu(placed @ weights["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    prefix = inner @ weights["cls_embedding.cap_proj.fc2.weight"].T
    return _logits(weights, prefix, seen, codes, heads, grid)[width - 1 :]


def _logits(weights: Weights, prefix: Tensor, seen: Tensor, codes: list[int], heads: int, grid: int) -> Tensor:
    x = torch.cat([prefix, weights["tok_embeddings.weight"][codes]])
    hidden = torch.ones(len(x), len(x)).triu(1).bool()
    hidden[:, : len(prefix)] |= ~seen
    hidden.fill_diagonal_(False)
    for layer in range(sum(name.endswith("attention.wo.weight") for name in weights)):
        own = {n.removeprefix(f"layers.{layer}."): w for n, w in weights.items() if n.startswith(f"layers.{layer}.")}
        query, key, value = (_norm(x, own["attention_norm.weight"]) @ own["attention.wqkv.weight"].T).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (query, key, value))
        query, key = _turned(query, len(prefix), grid), _turned(key, len(prefix), grid)
        scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        x = x + (scores.softmax(-1) @ value).transpose(0, 1).flatten(1) @ own["attention.wo.weight"].T
        inner = _norm(x, own["ffn_norm.weight"])
        gated = F.silu(inner @ own["feed_forward.w1.weight"].T) * (inner @ own["feed_forward.w3.weight"].T)
        x = x + gated @ own["feed_forward.w2.weight"].T
    return _norm(x, weights["norm.weight"]) @ weights["output.weight"].T


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _turned(heads: Tensor, before: int, grid: int) -> Tensor:
    """[heads, before + codes, D]: neighbouring channels are a complex number; the condition's is zero."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    count = pairs.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(count) / count)
    rows = torch.arange(heads.shape[1] - before).div(grid, rounding_mode="floor")
    columns = torch.arange(heads.shape[1] - before) % grid
    angle = torch.cat([rows[:, None] * frequency, columns[:, None] * frequency], 1)
    turn = torch.cat([torch.zeros(before, 2 * count), torch.polar(torch.ones_like(angle), angle)])
    return torch.view_as_real(pairs * turn).flatten(-2)


BASE, CHANNELS, LEVELS, BLOCKS = 32, 16, 5, 1
"""A narrow image tokenizer with the published five levels."""


def _random_network(drawn: Callable[..., Tensor]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {"quantize.codebook_used": torch.zeros(65536)}

    def conv(name: str, out: int, into: int, size: int) -> None:
        weights[f"{name}.weight"] = drawn(out, into, size, size, scale=0.3 / size)
        weights[f"{name}.bias"] = drawn(out)

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + drawn(width), drawn(width)

    def residual(name: str, width: int) -> None:
        for number in ("1", "2"):
            norm(f"{name}.norm{number}", width)
            conv(f"{name}.conv{number}", width, width, 3)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    for side, extra in (("encoder", 0), ("decoder", 1)):
        conv(f"{side}.conv_in", BASE, CHANNELS if extra else 3, 3)
        for level in range(LEVELS):
            place = f"{side}.conv_blocks.{level}"
            deepest = level == (0 if extra else LEVELS - 1)
            for block in range(BLOCKS + extra):
                residual(f"{place}.res.{block}", BASE)
                if deepest:
                    attention(f"{place}.attn.{block}", BASE)
            if level != LEVELS - 1:
                conv(f"{place}.{'upsample' if extra else 'downsample'}.conv", BASE, BASE, 3)
        residual(f"{side}.mid.0", BASE)
        attention(f"{side}.mid.1", BASE)
        residual(f"{side}.mid.2", BASE)
        norm(f"{side}.norm_out", BASE)
        conv(f"{side}.conv_out", 3 if extra else CHANNELS, BASE, 3)
    conv("quant_conv", 8, CHANNELS, 1)
    conv("post_quant_conv", CHANNELS, 8, 1)
    weights["quantize.embedding.weight"] = drawn(16384, 8, scale=2)  # of no common length, as training leaves them
    return weights


def encode(weights: Weights, pixels: Tensor) -> Tensor:
    """Codes [B, rows, cols] of pixels in [-1, 1]."""
    latents = _conv(weights, "quant_conv", _side(weights, "encoder", pixels), 0).movedim(1, -1)
    book = F.normalize(weights["quantize.embedding.weight"], dim=-1)
    return (F.normalize(latents, dim=-1).unsqueeze(-2) - book).square().sum(-1).argmin(-1)


def decode(weights: Weights, codes: Tensor) -> Tensor:
    """Pixels [B, 3, H, W], in [-1, 1] but for overshoot, of codes [B, rows, cols]."""
    latents = F.normalize(weights["quantize.embedding.weight"], dim=-1)[codes].movedim(-1, 1)
    return _side(weights, "decoder", _conv(weights, "post_quant_conv", latents, 0))


def _side(weights: Weights, side: str, x: Tensor) -> Tensor:
    x = _conv(weights, f"{side}.conv_in", x, 1)
    if side == "decoder":
        x = _middle(weights, side, x)
    for level in range(LEVELS):
        place = f"{side}.conv_blocks.{level}"
        for block in range(BLOCKS + (side == "decoder")):
            x = _residual(weights, f"{place}.res.{block}", x)
            if f"{place}.attn.{block}.q.weight" in weights:
                x = _attention(weights, f"{place}.attn.{block}", x)
        if f"{place}.downsample.conv.weight" in weights:
            x = _conv(weights, f"{place}.downsample.conv", F.pad(x, (0, 1, 0, 1)), 0, stride=2)
        if f"{place}.upsample.conv.weight" in weights:
            x = _conv(weights, f"{place}.upsample.conv", x.repeat_interleave(2, -1).repeat_interleave(2, -2), 1)
    if side == "encoder":
        x = _middle(weights, side, x)
    return _conv(weights, f"{side}.conv_out", F.silu(_group(weights, f"{side}.norm_out", x)), 1)


def _middle(weights: Weights, side: str, x: Tensor) -> Tensor:
    x = _attention(weights, f"{side}.mid.1", _residual(weights, f"{side}.mid.0", x))
    return _residual(weights, f"{side}.mid.2", x)


def _conv(weights: Weights, name: str, x: Tensor, padding: int, stride: int = 1) -> Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding, stride=stride)


def _group(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def _residual(weights: Weights, name: str, x: Tensor) -> Tensor:
    inner = _conv(weights, f"{name}.conv1", F.silu(_group(weights, f"{name}.norm1", x)), 1)
    return x + _conv(weights, f"{name}.conv2", F.silu(_group(weights, f"{name}.norm2", inner)), 1)


def _attention(weights: Weights, name: str, x: Tensor) -> Tensor:
    normed = _group(weights, f"{name}.norm", x)
    query, key, value = (_conv(weights, f"{name}.{part}", normed, 0).flatten(2) for part in "qkv")
    scores = (query.transpose(1, 2) @ key / x.shape[1] ** 0.5).softmax(-1)
    mixed = (value @ scores.transpose(1, 2)).unflatten(2, x.shape[2:])
    return x + _conv(weights, f"{name}.proj_out", mixed, 0)
