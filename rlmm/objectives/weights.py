"""Token weights: the loss of an optimiser step is exactly sum(weight * per-token loss).

The sum runs over every token of every micro-batch of every process. Denominators are counts over the whole
step, passed in, so the loss depends neither on the micro-batch size nor on the number of processes. Where a
distributed backend averages gradients over processes, multiply the local sum by the number of processes
first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlmm.config.base import nearest
from rollouts.trajectory import IMAGE, TEXT


@dataclass(frozen=True)
class Totals:
    """Kept rows with at least one decided token, and their decided tokens. Counts of parts add up with
    `+`."""

    sequences: int
    tokens: int

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.sequences + other.sequences, self.tokens + other.tokens)


@dataclass(frozen=True)
class ModalityTotals:
    """Target tokens a modality. Counts of parts add up with `+`."""

    text: int
    image: int

    def __add__(self, other: "ModalityTotals") -> "ModalityTotals":
        return ModalityTotals(self.text + other.text, self.image + other.image)


def count_totals(target_mask_BS: Tensor, kept_B: Tensor) -> Totals:
    """The counts of these rows; add or all-reduce them to those of the step."""
    length_B = (target_mask_BS & kept_B[:, None]).sum(1)
    return Totals(int((length_B > 0).sum()), int(length_B.sum()))


def _sequence_mean(length_B: Tensor, totals: Totals, max_length: int | None) -> Tensor:
    return 1 / (totals.sequences * length_B.clamp(min=1))


def _token_mean(length_B: Tensor, totals: Totals, max_length: int | None) -> Tensor:
    return torch.full_like(length_B, 1 / totals.tokens)


def _constant_length(length_B: Tensor, totals: Totals, max_length: int | None) -> Tensor:
    if max_length is None:
        raise ValueError("dr_grpo divides by a constant length: pass max_length, the longest a response may be")
    if length_B.numel() and length_B.max() > max_length:
        raise ValueError(f"a row has {int(length_B.max())} decided tokens, more than max_length {max_length}")
    return torch.full_like(length_B, 1 / (totals.sequences * max_length))


def _sequence_sum(length_B: Tensor, totals: Totals, max_length: int | None) -> Tensor:
    return torch.full_like(length_B, 1 / totals.sequences)


# kind -> weight of each decided token of a row: (tokens of the row [B], totals, max_length) -> [B]
WEIGHTS: dict[str, Callable[[Tensor, Totals, int | None], Tensor]] = {
    "grpo": _sequence_mean,  # arXiv 2402.03300, eq. 3: 1/N sum_i 1/|o_i| sum_t
    "dapo": _token_mean,  # arXiv 2503.14476, eq. 12: 1/(sum_i |o_i|) sum_i sum_t
    "dr_grpo": _constant_length,  # arXiv 2503.20783, section 3.2: 1/(N L_max) sum_i sum_t
    "rloo": _sequence_sum,  # arXiv 2402.14740, eq. 7: 1/N sum_i sum_t
}


def token_weights(
    kind: str,
    target_mask_BS: Tensor,
    kept_B: Tensor,
    *,
    totals: Totals,
    max_length: int | None = None,
    advantage_weight_BS: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights [B, S] of `dtype`, 0 outside the decided tokens of kept rows.

    target_mask_BS, kept_B: bool. totals: of the whole optimiser step. max_length: needed by `dr_grpo` alone.
    advantage_weight_BS: weights of the spans; they multiply the result and leave the denominators as they
    are.
    """
    if kind not in WEIGHTS:
        raise ValueError(f"unknown token weights {kind!r}.{nearest(kind, list(WEIGHTS))}")
    counted_BS = target_mask_BS & kept_B[:, None]
    if not counted_BS.any():
        return torch.zeros(counted_BS.shape, dtype=dtype, device=counted_BS.device)
    _check_share(count_totals(target_mask_BS, kept_B), totals)
    weight_B = WEIGHTS[kind](counted_BS.sum(1).to(torch.float64), totals, max_length)
    weight_BS = weight_B[:, None] * counted_BS
    return (weight_BS if advantage_weight_BS is None else weight_BS * advantage_weight_BS).to(dtype)


def count_modalities(target_mask_BS: Tensor, modality_BS: Tensor) -> ModalityTotals:
    """Target tokens of each modality in these rows; add or all-reduce them to those of the step."""
    unknown = modality_BS[target_mask_BS & (modality_BS != TEXT) & (modality_BS != IMAGE)]
    if unknown.numel():
        raise ValueError(f"target tokens of modality {int(unknown[0])}; known are {TEXT} (text) and {IMAGE} (image)")
    text = int((target_mask_BS & (modality_BS == TEXT)).sum())
    return ModalityTotals(text, int(target_mask_BS.sum()) - text)


def sft_token_weights(
    target_mask_BS: Tensor,
    modality_BS: Tensor,
    text_weight: float,
    image_weight: float,
    *,
    totals: ModalityTotals,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights [B, S] of the cross-entropy, in proportion to the modality's weight, summing to 1 over the
    step.

    target_mask_BS: bool; modality_BS: 0 text, 1 image; totals: of the whole optimiser step.
    """
    if text_weight < 0 or image_weight < 0:
        raise ValueError(f"weights of text {text_weight} and image {image_weight} tokens must not be negative")
    local = count_modalities(target_mask_BS, modality_BS)
    if local.text > totals.text or local.image > totals.image:
        raise ValueError(f"{local} of these rows exceed the step's {totals}: pass the counts of the whole step")
    mass = text_weight * totals.text + image_weight * totals.image
    if mass <= 0:
        raise ValueError(
            f"no token of the step has weight ({totals}, text_weight {text_weight}, image_weight"
            f" {image_weight}): nothing would be learnt; give a modality that is there a positive weight"
        )
    weight_BS = torch.full(target_mask_BS.shape, image_weight / mass, dtype=dtype, device=target_mask_BS.device)
    return weight_BS.masked_fill(modality_BS == TEXT, text_weight / mass).masked_fill(~target_mask_BS, 0.0)


def _check_share(local: Totals, totals: Totals) -> None:
    if local.sequences > totals.sequences or local.tokens > totals.tokens:
        raise ValueError(f"{local} of these rows exceed the step's {totals}: pass the counts of the whole step")
