"""What a codec is trained on, and how well it keeps an image."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlmm.codecs.base import Codec, CodecOutput, PatchCodec
from rlmm.codecs.together import of_all, summed

Distance = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction [B,C,H,W], images [B,C,H,W]) -> their distance []."""


def codec_loss(
    codec: nn.Module, images_BCHW: Tensor, perceptual: Distance | None = None, perceptual_weight: float = 1.0
) -> tuple[Tensor, dict[str, float]]:
    """L1 + MSE (+ edges) (+ perceptual) + the quantizer's own loss, as means over pixels; and figures of the batch, of
    equal parts on all processes that share it.

    `codec` may be a data-parallel wrapper: only its forward is called.
    """
    output: CodecOutput = codec(images_BCHW)
    error = output.reconstruction - images_BCHW
    loss = error.abs().mean() + error.square().mean() + output.auxiliary
    own = cast(PatchCodec, getattr(codec, "module", codec))
    if own.edge_weight:
        loss = loss + own.edge_weight * edge_loss(output.reconstruction, images_BCHW)
    with torch.no_grad():
        mse = (output.reconstruction.clamp(0, 1) - images_BCHW).square().mean()
        figures = {"psnr_db": _decibels(of_all(mse).mean())}
        figures |= _use(summed(_counts(output.ids, own.num_codes)))
    if perceptual is not None:
        distance = perceptual(output.reconstruction, images_BCHW)
        loss = loss + perceptual_weight * distance
        figures["perceptual"] = float(distance.detach())
    return loss, figures


def edge_loss(first: Tensor, second: Tensor, scales: int = 3) -> Tensor:
    """Mean |difference of neighbouring-pixel gradients| over `scales` halvings of the image: strokes, not fill."""
    total = first.new_zeros(())
    for _ in range(scales):
        for axis in (-1, -2):
            total = total + (first.diff(dim=axis) - second.diff(dim=axis)).abs().mean()
        if min(first.shape[-2:]) < 4:
            break
        first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
    return total


def psnr_db(reconstruction: Tensor, images: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels, of the mean squared error over all pixels in [0, 1]."""
    return _decibels((reconstruction - images).square().mean())


def _decibels(mse: Tensor) -> float:
    return float(-10 * mse.clamp_min(1e-12).log10())


def code_use(ids: Tensor, num_codes: int) -> dict[str, float]:
    """`codebook_use`: share of codes that occur; `codebook_perplexity`: exp of the entropy of their frequencies."""
    return _use(_counts(ids, num_codes))


def _counts(ids: Tensor, num_codes: int) -> Tensor:
    return torch.bincount(ids.flatten(), minlength=num_codes)


def _use(counts: Tensor) -> dict[str, float]:
    share = counts.double() / counts.sum()
    return {
        "codebook_use": float((counts > 0).double().mean()),
        "codebook_perplexity": float(torch.special.entr(share).sum().exp()),
    }


@torch.no_grad()
def reconstruction_metrics(codec: Codec, images_BCHW: Tensor) -> dict[str, float]:
    """PSNR and code use through encode and decode, and the share of codes that decode-encode leaves as they are."""
    images_BCHW = images_BCHW.to(codec.device)
    ids = codec.encode(images_BCHW)
    decoded = codec.decode(ids)
    stable = (codec.encode(decoded) == ids).double().mean()
    return {"psnr_db": psnr_db(decoded, images_BCHW), **code_use(ids, codec.num_codes), "stable_codes": float(stable)}
