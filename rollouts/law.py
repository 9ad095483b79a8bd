"""The law: from a model's logits to the distribution a decision is drawn from.

One function, `law_log_probs`, is used by every sampler and by the trainer, so the two cannot disagree. The order is
fixed: streams are mixed (guidance, on logits), divided by the temperature, restricted to the allowed vocabulary and to
the top-k/top-p support, and normalised by a log-softmax in at least float32.

Shapes: N rows of decisions, V size of the allowed vocabulary slice.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

GuidanceMode = Literal["none", "guided", "conditional_only", "rescaled"]

COND, UNCOND, SOURCE = "cond", "uncond", "source"


@dataclass(frozen=True)
class Law:
    """What a span's tokens are sampled from, and what the trainer must differentiate.

    `vocabulary` is the half-open slice [low, high) of token ids that may be drawn. `guidance_scale` s mixes
    u + s (c - u); with `source_scale` s_i (editing) it is u + s_i (c_i - u) + s (c - c_i), where c_i sees the source
    image and not the text. `top_k` 0 and `top_p` 1 keep everything.

    `mode` says what the trainer's log-probs are. `none` and `guided`: the sampled law itself. `conditional_only`
    (log-probs of c alone) and `rescaled` (of c - (s-1)/s u, the guided law at temperature s T) reproduce published
    systems and are off-policy.
    """

    vocabulary: tuple[int, int]
    temperature: float = 1.0
    guidance_scale: float = 1.0
    source_scale: float | None = None
    mode: GuidanceMode = "guided"
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.vocabulary
        if not 0 <= low < high:
            raise ValueError(f"law: vocabulary slice [{low}, {high}) is empty or negative; give low < high token ids")
        if self.temperature <= 0:
            raise ValueError(
                f"law: temperature {self.temperature} must be > 0; for near-greedy sampling use a small one, e.g. 0.01"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"law: top_k {self.top_k} must be >= 0 and top_p {self.top_p} in (0, 1]")
        if self.mode == "rescaled" and self.guidance_scale == 0:
            raise ValueError("law: guidance mode 'rescaled' divides by the scale, and the scale is 0; use another mode")
        if self.mode == "none" and self.guidance_scale != 1.0:
            raise ValueError(
                f"law: guidance mode 'none' with scale {self.guidance_scale}; set the scale to 1 or "
                "the mode to 'guided'"
            )

    @property
    def guided(self) -> bool:
        """Whether sampling mixes more than the conditional stream."""
        return self.guidance_scale != 1.0 or self.source_scale is not None

    @property
    def truncated(self) -> bool:
        """Whether sampling keeps a top-k/top-p support, which replay then needs stored."""
        return self.top_p < 1.0 or 0 < self.top_k < self.vocabulary[1] - self.vocabulary[0]

    @property
    def off_policy(self) -> bool:
        """Whether the trainer's log-probs are, by choice, not those of the sampled law."""
        return self.guided and self.mode in ("conditional_only", "rescaled")

    def streams(self, *, replay: bool = False) -> tuple[str, ...]:
        """The conditioning streams whose logits are needed, in the order of the doubled batch."""
        if not self.guided or (replay and self.mode == "conditional_only"):
            return (COND,)
        return (COND, UNCOND) if self.source_scale is None else (COND, UNCOND, SOURCE)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> "Law":
        fields: dict[str, Any] = {**record, "vocabulary": tuple(record["vocabulary"])}
        return Law(**fields)


def mix_streams(law: Law, logits: Mapping[str, Tensor], *, replay: bool = False) -> Tensor:
    """Guided logits [N, V] (Ho & Salimans 2022, arXiv 2207.12598; the two-scale form: Brooks et al. 2023, eq. 3).

    Logits are mixed, not log-probs. With `replay`, what the trainer differentiates: the same mix for `none` and
    `guided`, the published off-policy forms for the other two modes.
    """
    if not law.guided or (replay and law.mode == "conditional_only"):
        return logits[COND]
    if law.source_scale is not None:
        source = logits[SOURCE]
        mixed = logits[UNCOND] + law.source_scale * (source - logits[UNCOND])
        mixed = mixed + law.guidance_scale * (logits[COND] - source)
    else:
        mixed = logits[UNCOND] + law.guidance_scale * (logits[COND] - logits[UNCOND])
    return mixed / law.guidance_scale if replay and law.mode == "rescaled" else mixed


def top_support(scaled_NV: Tensor, law: Law) -> Tensor | None:
    """The top-k/top-p support [N, V] (bool) of tempered logits, or None where nothing is cut.

    Top-k keeps ties with the k-th logit; top-p keeps the smallest set of most probable tokens, within the top-k, whose
    mass reaches p (Holtzman et al. 2020), the token that crosses p included.
    """
    if not law.truncated:
        return None
    keep_NV = torch.ones_like(scaled_NV, dtype=torch.bool)
    if 0 < law.top_k < scaled_NV.shape[-1]:
        keep_NV = scaled_NV >= scaled_NV.topk(law.top_k, dim=-1).values[:, -1:]
    if law.top_p < 1.0:
        probs_NV = scaled_NV.masked_fill(~keep_NV, -torch.inf).softmax(-1)
        sorted_NV, order_NV = probs_NV.sort(dim=-1, descending=True, stable=True)
        before_NV = sorted_NV.cumsum(-1) - sorted_NV
        nucleus_NV = torch.zeros_like(keep_NV).scatter(-1, order_NV, before_NV < law.top_p)
        keep_NV = keep_NV & nucleus_NV
    return keep_NV


def law_log_probs(
    law: Law,
    logits: Mapping[str, Tensor],
    *,
    support_NV: Tensor | None = None,
    replay: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [N, V] over the allowed slice, and the support [N, V] they are normalised over (None = all).

    Args:
        logits: stream name -> [N, V] logits, already restricted to `law.vocabulary`.
        support_NV: the support stored at sampling. Replay of a truncated law requires it: a support recomputed from
            the trainer's logits can differ at its boundary, and then the ratio is between two different laws.
        replay: True in the trainer, False in a sampler.

    Raises:
        ValueError: replay of a top-k/top-p law without its stored support.
    """
    mixed_NV = mix_streams(law, logits, replay=replay)
    scaled_NV = mixed_NV.to(torch.promote_types(mixed_NV.dtype, torch.float32)) / law.temperature
    if replay and law.truncated and support_NV is None:
        raise ValueError(
            f"replay of a law with top_k={law.top_k}, top_p={law.top_p} needs the support kept at sampling, and the "
            "trajectory holds none; sample with an engine that stores it, or train with top_k=0 and top_p=1"
        )
    if support_NV is None and not replay:
        support_NV = top_support(scaled_NV, law)
    if support_NV is not None:
        scaled_NV = scaled_NV.masked_fill(~support_NV, -torch.inf)
    return scaled_NV.log_softmax(-1), support_NV


def draw(logp_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Inverse-CDF draws [N] (int64, index within the slice) from log-probs and uniforms in [0, 1), in float64.

    One uniform decides one token, so a row's tokens depend on its own seed alone, not on the batch around it.
    """
    cdf_NV = logp_NV.double().exp().cumsum(-1)
    # 1 - u lies in (0, 1]: an entry of probability zero is never the first to reach it.
    target_N1 = (1.0 - uniform_N.double()).unsqueeze(-1) * cdf_NV[:, -1:]
    return torch.searchsorted(cdf_NV, target_N1).squeeze(-1).clamp_max(logp_NV.shape[-1] - 1)


def row_uniforms(seeds: list[int], length: int) -> Tensor:
    """Uniforms [B, length] in [0, 1), float64: row b is a function of seeds[b] alone (Philox counter generator)."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(length) for seed in seeds]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, length, dtype=torch.float64)


def pack_support(support: Tensor) -> Tensor:
    """Pack a bool support [..., V] into bytes [..., ceil(V/8)] (uint8)."""
    return torch.from_numpy(np.packbits(support.cpu().numpy(), axis=-1))


def unpack_support(packed: Tensor, size: int) -> Tensor:
    """Undo `pack_support` for a slice of `size` tokens."""
    places_8 = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = packed.unsqueeze(-1).bitwise_right_shift(places_8).bitwise_and_(1)
    return bits.flatten(-2)[..., :size].bool()
