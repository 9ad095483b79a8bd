"""The SFT stage: cross-entropy on image (and text) tokens under one set of weights that sum to 1 over a step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlmm.config.masked import NoiseConfig
from rlmm.config.stages import SftStage
from rlmm.objectives.noise import training_noise
from rlmm.objectives.weights import count_modalities, sft_token_weights
from rlmm.policies.base import Policy, SequenceBatch
from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.preflight import check_text
from rlmm.seeds import derive, epoch_indices, generator
from rlmm.train.context import StageContext, image_tokens, load_split, run_codec, starting_policy
from rlmm.train.metrics import Meter
from rlmm.train.processes import share, world
from rlmm.train.prompts import reasons
from rlmm.train.results import save_result
from rlmm.train.running import train
from rlmm.train.supervised import encode_rows, first_rows, understanding_rows
from rollouts.contract import Layout
from rollouts.trajectory import IMAGE, TEXT


@dataclass(frozen=True)
class SftBatch:
    """A micro-batch with the weight [B, T] of each target token in the step's loss."""

    sequences: SequenceBatch
    weight_BT: Tensor

    def to(self, device: torch.device | str) -> "SftBatch":
        return SftBatch(self.sequences.to(device), self.weight_BT.to(device))


class SftSource:
    """Step -> micro-batches. Rows of a step are sorted by length, so that short ones are not padded to long ones.
    `understanding`: rows that make up their share of each batch."""

    nothing_counts = False

    def __init__(
        self,
        layout: Layout,
        rows: Sequence[Supervised],
        config: SftStage,
        seed: int,
        understanding: Sequence[Supervised] = (),
    ) -> None:
        check_text(config, layout)
        self.layout, self.config, self.seed = layout, config, seed
        self.rows, self.own = [*rows, *understanding], len(rows)
        mine = share(config.batch_size, "batch_size")
        self.micro_batches_per_step = _whole(mine.stop - mine.start, config.micro_batch_size)

    def micro_batches(self, step: int) -> list[SftBatch]:
        config = self.config
        picked = self._picked(step)
        # Both masks of one picture have one prompt, or what one leaves the other would not fill.
        luck = (
            generator(self.seed, "prompt dropout", step)
            .random(len(picked) // self.config.rows_each)
            .repeat(self.config.rows_each)
        )
        dropped = luck < config.prompt_dropout
        # Half of the dropped prompts lose their source images too: guidance has a stream with them and one without.
        bare = luck < config.prompt_dropout / 2
        rows = [self._row(i, drop, alone) for i, drop, alone in zip(picked, dropped, bare, strict=True)]
        whole = supervised_batch(self.layout, rows)
        whole, weight_BT = self._weighed(whole, step)
        mine = range(len(picked))[share(config.batch_size, "batch_size")]
        order = sorted(mine, key=lambda row: (int(whole.mask_BT[row].sum()), row))
        size = config.micro_batch_size
        return [_cut(whole, weight_BT, order[at : at + size]) for at in range(0, len(order), size)]

    def _picked(self, step: int) -> list[int]:
        """Row numbers of a step; under complementary noise each twice in a row."""
        each, others = self.config.rows_each, self.config.rows_beside
        size = self.config.batch_size // each
        rows = epoch_indices(self.own, step * (size - others), size - others, self.seed)
        if others:
            more = epoch_indices(len(self.rows) - self.own, step * others, others, self.seed, "understanding")
            rows += [self.own + row for row in more]
        return [row for row in rows for _ in range(each)]

    def _row(self, number: int, dropped: bool, bare: bool) -> Supervised:
        """A row, or what the unconditional stream sees of it: no prompt, no thought. A text alone has none."""
        row = self.rows[number]
        if not dropped or row.image is None:
            return row
        return replace(row, prompt=self.layout.null(row.prompt), text=(), sources=() if bare else row.sources)

    def _weighed(self, whole: SequenceBatch, step: int) -> tuple[SequenceBatch, Tensor]:
        """The step's sequences, masked where the policy learns so, and the weight of each target in its loss."""
        config, each, count_BT, factor_BT = self.config, self.config.rows_each, whole.target_BT, None
        if self.layout.mask is not None:
            noise = config.noise or NoiseConfig()
            taught_BT = whole.target_BT & ((whole.modality_BT == IMAGE) | (config.text_weight > 0))
            taught_BT &= (whole.modality_BT == TEXT) | (config.image_weight > 0)
            places = range(len(taught_BT))
            noised_BT, factor_BT = training_noise(
                taught_BT, [derive(self.seed, "noise", step, place // each) for place in places], noise.schedule,
                noise.weighting, complement=[place % 2 == 1 for place in places] if each == 2 else None,
            )  # fmt: skip
            whole = replace(whole, noised_BT=noised_BT)
            count_BT = noised_BT if noise.weighting == "mean" else whole.target_BT
        totals = count_modalities(count_BT, whole.modality_BT)
        weight_BT = sft_token_weights(
            count_BT, whole.modality_BT, config.text_weight, config.image_weight, totals=totals
        )
        return whole, weight_BT if factor_BT is None else weight_BT * factor_BT.to(weight_BT)


def _cut(whole: SequenceBatch, weight_BT: Tensor, rows: list[int]) -> SftBatch:
    width = int(whole.mask_BT[rows].sum(1).max())
    return SftBatch(whole.each(lambda value: value[rows, :width]), weight_BT[rows, :width])


def sft_loss(policy: Policy, model: nn.Module, batch: SftBatch, meter: Meter) -> Tensor:
    """-sum(weight x log-prob); the mean loss of each modality is metered beside it, in nats a token."""
    logp_BT = policy.sequence_log_probs(batch.sequences, model=model)
    for name, modality in (("text", TEXT), ("image", IMAGE)):
        where = batch.sequences.target_BT & (batch.sequences.modality_BT == modality)
        if batch.sequences.noised_BT is not None:
            where &= batch.sequences.noised_BT
        meter.add(f"loss/{name}", float(-logp_BT.detach()[where].sum()), float(where.sum()))
    return -(batch.weight_BT * logp_BT).sum()


def run_sft(context: StageContext) -> None:
    """Train from the starting policy on the recipe's `train` split; leaves model/ in the stage's folder."""
    config: SftStage = context.config
    codec = run_codec(context)
    policy = starting_policy(context, codec)
    data = first_rows(load_split(context, config.pairs, policy.spelling), config.images)
    tokens = image_tokens(context, codec, policy)
    rows, left_out = encode_rows(tokens, policy.spelling, config.writing, data)
    if left_out:
        context.say(
            f"{config.pairs} data: {left_out.total()} of {len(data)} rows are not learnt from ({reasons(left_out)})"
        )
    others = understanding_rows(context, tokens, policy.spelling) if config.understanding_share else []
    if world()[0] == 0:
        tokens.save()
    source = SftSource(policy.layout, rows, config, context.seed("batches"), others)
    train(
        context,
        policy.model,
        source,
        lambda model, batch, meter: sft_loss(policy, model, batch, meter),
        Meter(),
        micro_batch_size=config.micro_batch_size,
        show=("loss", "loss/image", "learning_rate", "grad_norm"),
    )
    save_result(context, policy, codec)


def _whole(rows: int, size: int) -> int:
    if rows % size:
        raise ValueError(f"{rows} rows a process are not a multiple of micro_batch_size {size}; change either")
    return rows // size
