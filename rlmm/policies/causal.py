"""The next-token policy: one causal forward gives every log-prob of a trajectory, exactly.

Shapes: B rows, S response positions, P prefix positions, K streams, T = P + S - 1 positions fed, N decisions.
"""

import torch
from torch import Tensor, nn

from rlmm.objectives.estimators import Estimator
from rlmm.objectives.legality import LogProbKind
from rlmm.policies.base import LogProbs, SequenceBatch, streams_needed
from rlmm.policies.parts import several_processes
from rlmm.policies.transformer import TransformerPolicy
from rollouts.law import COND, Law
from rollouts.trajectory import IMAGE, TEXT, Trajectory


class CausalPolicy(TransformerPolicy):
    """Every position is decided from those before it."""

    log_prob_kind = LogProbKind.EXACT

    def attention(self, ids_BT: Tensor, mask_BT: Tensor, first: int = 0) -> Tensor:
        """See `TransformerPolicy`. Without padding no mask is needed. A padded position sees itself, too: a row that
        sees nothing is not a number."""
        if self.base.config._attn_implementation != "sdpa" or mask_BT.all():
            return mask_BT
        place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        place_Q1 = place_T[first:, None]
        return self.added_to_scores((mask_BT[:, None] & (place_T <= place_Q1)) | (place_T == place_Q1))

    def log_probs(
        self,
        trajectory: Trajectory,
        *,
        model: nn.Module | None = None,
        entropy_gradient: bool = False,
        estimator: Estimator | None = None,
    ) -> LogProbs:
        """Log-probs of the trajectory under the laws it was sampled from, with gradient. They are exact, so there is
        nothing to choose an estimator for: ValueError where one is given."""
        if estimator is not None:
            raise ValueError(f"a next-token policy's log-probs are exact; leave the estimator {estimator.scheme!r} out")
        used_S = trajectory.attention_mask.any(0)
        if not used_S.all():  # past the longest text of these rows
            return self._of_used(trajectory, used_S, model, entropy_gradient)
        names = streams_needed(trajectory)
        hidden_KBSH = self._response_hidden(trajectory, names, model)
        rows, length = trajectory.ids.shape
        logp_BS = hidden_KBSH.new_zeros(rows, length, dtype=torch.promote_types(hidden_KBSH.dtype, torch.float32))
        entropy_BS = torch.zeros_like(logp_BS)
        for index, span in enumerate(trajectory.spans):
            where = trajectory.target_mask & (trajectory.span == index)
            hidden_KNH = torch.stack([hidden_KBSH[names.index(name)][where] for name in span.law.streams(replay=True)])
            kept = trajectory.support if span.law.truncated else None
            support = None if kept is None else kept[where]
            tokens_N = trajectory.ids[where]
            logp_N, entropy_N = self.decide(span.law, hidden_KNH, tokens_N, support, entropy_gradient=entropy_gradient)
            logp_BS = logp_BS.masked_scatter(where, logp_N)
            entropy_BS = entropy_BS.masked_scatter(where, entropy_N)
        if self.needs_image_head:
            logp_N, _ = self.decide(Law(self.layout.image), hidden_KBSH[:1, 0, :0], trajectory.ids[0, :0])
            logp_BS = logp_BS + logp_N.sum()
        return LogProbs(self.log_prob_kind, logp_BS, entropy_BS)

    @property
    def needs_image_head(self) -> bool:
        """Whether the image head must be in an update's graph though no image token is: the head is a trained one of
        its own, and each of several plain processes waits for every gradient in every micro-batch."""
        return bool(self.untrained_parts) and several_processes() and torch.is_grad_enabled() and not self.in_parts

    def _of_used(
        self, trajectory: Trajectory, used_S: Tensor, model: nn.Module | None, entropy_gradient: bool
    ) -> LogProbs:
        """Log-probs without the positions that no row has."""
        index_U = used_S.nonzero().squeeze(1)
        found = self.log_probs(trajectory.columns(index_U), model=model, entropy_gradient=entropy_gradient)

        def whole(values_BU: Tensor) -> Tensor:
            empty_BS = values_BU.new_zeros(trajectory.ids.shape)
            return empty_BS.index_copy(1, index_U.to(values_BU.device), values_BU)

        return LogProbs(found.kind, whole(found.logp_BS), whole(found.entropy_BS))

    def sequence_log_probs(self, batch: SequenceBatch, *, model: nn.Module | None = None) -> Tensor:
        """Log-probs [B, T] of supervised targets, each normalised over its own modality's vocabulary slice."""
        hidden_BTH = self.hidden(batch.ids_BT[:, :-1], batch.mask_BT[:, :-1], model=model)
        logp_BT = hidden_BTH.new_zeros(batch.ids_BT.shape, dtype=torch.promote_types(hidden_BTH.dtype, torch.float32))
        for modality, vocabulary in ((TEXT, self.layout.text), (IMAGE, self.layout.image)):
            where = batch.target_BT & (batch.modality_BT == modality)
            if where[:, 1:].any() or self.in_parts or (modality == IMAGE and self.needs_image_head):
                hidden_1NH = hidden_BTH[where[:, 1:]].unsqueeze(0)
                tokens_N = batch.ids_BT[where]
                logp_N, _ = self.decide(Law(vocabulary), hidden_1NH, tokens_N)
                logp_BT = logp_BT.masked_scatter(where, logp_N)
        return logp_BT

    def _response_hidden(self, trajectory: Trajectory, names: list[str], model: nn.Module | None) -> Tensor:
        """Hidden states [K, B, S, H] from which each response position is decided: one forward for all streams."""
        rows, length = trajectory.ids.shape
        width = max(trajectory.streams[name].ids_BP.shape[1] for name in names)
        rows_of = [self._stream_rows(trajectory, name, width) for name in names]
        ids, masks = (torch.cat([part[:, :-1] for part in parts]) for parts in zip(*rows_of, strict=True))
        hidden = self.hidden(ids, masks, model=model)
        return hidden[:, width - 1 :].unflatten(0, (len(names), rows))

    def _stream_rows(self, trajectory: Trajectory, name: str, width: int) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, width + S] of a stream's prefix, left-padded to `width`, and the response."""
        stream = trajectory.streams[name]
        grow = (width - stream.ids_BP.shape[1], 0)
        prefix = nn.functional.pad(stream.ids_BP, grow, value=self.layout.pad)
        seen_BS = trajectory.attention_mask if stream.sees_BS is None else stream.sees_BS & trajectory.attention_mask
        mask = torch.cat([nn.functional.pad(stream.mask_BP, grow), seen_BS], 1)
        return torch.cat([prefix, trajectory.ids], 1), mask

    def image_hidden(self, trajectory: Trajectory) -> Tensor:
        """What the last layer holds of drawn images [B, 1 + L, H]: at the token before an image span and at each of its
        L tokens, in the conditional stream, under the present weights."""
        width = trajectory.streams[COND].ids_BP.shape[1]
        ids, mask = self._stream_rows(trajectory, COND, width)
        return self.hidden(ids, mask)[:, -1 - self.layout.grid.length :]
