"""Quantizers: continuous latents to codes and back, with straight-through gradients.

Shapes: B images, N tokens an image, D latent channels, C codes.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlmm.codecs.together import of_all, summed
from rlmm.config.codec import FsqCodec, LfqCodec, VqCodec


class Quantizer(Protocol):
    """`latent_dim` channels in; `forward` -> (quantized [B,N,D], ids [B,N] int64, auxiliary loss scalar)."""

    latent_dim: int

    def __call__(self, latents_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def codes(self, ids_BN: Tensor) -> Tensor:
        """Quantized latents [B, N, D] of codes."""
        ...


class Fsq(nn.Module):
    """Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505, section 3.1 and appendix A.1).

    Channel d is bounded to L_d values by a tanh (shifted by half a step where L_d is even) and rounded; ids are the
    mixed-radix number of the levels. Quantized values lie in [-1, 1].
    """

    def __init__(self, config: FsqCodec) -> None:
        super().__init__()
        self.latent_dim = len(config.levels)
        levels = torch.tensor(config.levels)
        self.register_buffer("levels_D", levels, persistent=False)
        basis = torch.cumprod(torch.tensor([1, *config.levels[:-1]]), 0)
        self.register_buffer("basis_D", basis, persistent=False)

    def forward(self, latents_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bounded = self._bound(latents_BND)
        rounded = bounded + (bounded.round() - bounded).detach()
        half_D = self.levels_D // 2
        ids_BN = ((rounded.detach().round().long() + half_D) * self.basis_D).sum(-1)
        return rounded / half_D, ids_BN, latents_BND.new_zeros(())

    def codes(self, ids_BN: Tensor) -> Tensor:
        digits = (ids_BN.unsqueeze(-1) // self.basis_D) % self.levels_D
        half_D = self.levels_D // 2
        return (digits - half_D).float() / half_D

    def _bound(self, latents: Tensor) -> Tensor:
        # A little wider than the outermost level, which the tanh then reaches (with 2 levels the shift needs it).
        half_width = (self.levels_D - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels_D % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half_width)
        return (latents + shift).tanh() * half_width - offset


class Vq(nn.Module):
    """Vector quantization (van den Oord et al. 2017, arXiv 1711.00937, eq. 3): codebook and commitment loss.

    Latents and codes are compared on the unit sphere (Yu et al. 2021, arXiv 2110.04627, section 3.2). A code that no
    latent of the batch chose is pulled to the one nearest to it, so that it comes into use: the closest-anchor rule
    of Zheng and Vedaldi 2023 (arXiv 2307.15139, section 3.2) as a loss, which needs no running counts and no draws.
    """

    def __init__(self, config: VqCodec) -> None:
        super().__init__()
        self.latent_dim, self.commitment = config.code_dim, config.commitment
        self.codebook_CD = nn.Parameter(torch.randn(config.codebook_size, config.code_dim))

    def forward(self, latents_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latents, book = F.normalize(latents_BND, dim=-1), F.normalize(self.codebook_CD, dim=-1)
        cosine_BNC = latents.detach() @ book.t()
        ids_BN = cosine_BNC.detach().argmax(-1)
        chosen = book[ids_BN]
        loss = (chosen - latents.detach()).square().mean()
        loss = loss + self.commitment * (latents - chosen.detach()).square().mean()
        ids = ids_BN.flatten()
        # As bincount, which tensors without values have not (`rlmm.planned_codec`).
        count_C = ids.new_zeros(len(book)).index_add(0, ids, torch.ones_like(ids))
        nearest_C = cosine_BNC.flatten(0, 1).amax(0)
        if self.training and torch.is_grad_enabled():  # of a batch that all processes share
            count_C, nearest_C = summed(count_C), of_all(nearest_C).amax(0)
        loss = loss + ((1 - nearest_C) * (count_C == 0)).mean()
        return latents + (chosen - latents).detach(), ids_BN, loss

    def codes(self, ids_BN: Tensor) -> Tensor:
        return F.normalize(self.codebook_CD, dim=-1)[ids_BN]


class Lfq(nn.Module):
    """Lookup-free quantization (Yu et al. 2023, arXiv 2310.05737, eq. 2-5): signs, with the entropy penalty.

    The penalty is computed bit by bit, which equals the whole codebook's since the bits' posteriors factorise (for the
    mean code distribution it is the factorised upper bound).
    """

    def __init__(self, config: LfqCodec) -> None:
        super().__init__()
        self.latent_dim, self.commitment, self.entropy_weight = config.bits, config.commitment, config.entropy_weight
        self.register_buffer("basis_D", 2 ** torch.arange(config.bits), persistent=False)

    def forward(self, latents_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        signs = torch.where(latents_BND > 0, 1.0, -1.0)
        ids_BN = ((signs > 0).long() * self.basis_D).sum(-1)
        logits = 4 * latents_BND  # of +1: softmax over {-1, +1} of -(z - c)^2
        sides_2D = _sides(logits.flatten(0, 1))
        if self.training and torch.is_grad_enabled():  # of a batch that all processes share
            sides_2D = of_all(sides_2D).logsumexp(0)
        penalty = _bit_entropy(logits).mean() - _bit_entropy(sides_2D[0] - sides_2D[1]).mean()
        loss = self.commitment * (latents_BND - signs).square().mean() + self.entropy_weight * penalty
        return latents_BND + (signs - latents_BND).detach(), ids_BN, loss

    def codes(self, ids_BN: Tensor) -> Tensor:
        return ((ids_BN.unsqueeze(-1) // self.basis_D) % 2).float() * 2 - 1


def _bit_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of bits that are 1 with probability sigmoid(logit); its gradient is finite at any logit."""
    return F.softplus(logits) - logits * logits.sigmoid()


def _sides(logits_RD: Tensor) -> Tensor:
    """Logarithms of the sums over rows of sigmoid(logit) and of 1 - sigmoid(logit) [2, D]; their difference is the
    logit of the mean, without a division by 0."""
    return torch.stack([F.logsigmoid(logits_RD).logsumexp(0), F.logsigmoid(-logits_RD).logsumexp(0)])
