"""The masked-diffusion policy: a bidirectional transformer that decides masked positions from all that is known.

A trajectory's log-prob takes one forward a state it went through; an ELBO's one a mask of the noise plan. Both read
states the same way. Shapes: B rows, S response positions, P prefix positions, K streams, R states, N decisions.
"""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlmm.objectives.estimators import Estimator, order_figures, plan_figures, step_weights, upper_log_probs
from rlmm.objectives.legality import LogProbKind
from rlmm.policies.base import LogProbs, SequenceBatch, streams_needed
from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Layout
from rollouts.law import Law, law_log_probs
from rollouts.trajectory import IMAGE, TEXT, Span, Trajectory
from rollouts.unmasking import Unmasking, order_log_probs

ALL_STEPS = Estimator()


@dataclass(frozen=True)
class States:
    """R partly masked responses: the row each belongs to, where it is masked, and what is read from it [R, S]."""

    row_R: Tensor
    masked_RS: Tensor
    read_RS: Tensor


class MaskedPolicy(TransformerPolicy):
    """Every position sees every other, but for prompts under `Layout.causal_prompt`; position i is decided from the
    hidden state at i.

    Raises ValueError for a layout without a mask token, and for a model whose attention is causal.
    """

    log_prob_kind = LogProbKind.TRAJECTORY

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
        super().__init__(model, tokenizer, layout)
        if layout.mask is None or getattr(self.base.config, "is_causal", True):
            raise ValueError(
                f"a masked policy needs a mask token (the layout's is {layout.mask}) and a config with is_causal false "
                f"(it is {getattr(self.base.config, 'is_causal', True)}); give a checkpoint of a masked family"
            )
        self.mask = layout.mask
        attention = self.base.config._attn_implementation
        if layout.causal_prompt and attention != "sdpa":
            raise ValueError(
                f"causal prompts are a mask of their own, which attention {attention!r} does not take as it is; load "
                'the model with attn_implementation="sdpa"'
            )

    def attention(self, ids_BT: Tensor, mask_BT: Tensor, first: int = 0) -> Tensor:
        """Everything sees everything, or what is before the image (up to the last token that announces one, or all of
        a sequence without) only what is before it. What is padding sees itself: a row that sees nothing is not a
        number."""
        if not self.layout.causal_prompt:
            return mask_BT
        place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        last_B1 = torch.where(ids_BT == self.layout.boi[-1], place_T, -1).amax(1, keepdim=True)
        image_BT1 = ((place_T > last_B1) & (last_B1 >= 0))[..., None]
        before_TT, itself_TT = place_T <= place_T[:, None], place_T == place_T[:, None]
        seen_BTT = (mask_BT[:, None].to(ids_BT.device) & (image_BT1 | before_TT)) | itself_TT
        return self.added_to_scores(seen_BTT[:, first:])

    def log_probs(
        self,
        trajectory: Trajectory,
        *,
        model: nn.Module | None = None,
        entropy_gradient: bool = False,
        estimator: Estimator | None = None,
    ) -> LogProbs:
        """By default along the trajectory, at every step of it, under the law it was sampled from. With a noise scheme
        [B, S] are each position's part of the estimate: only a row's sum means something."""
        estimator = estimator or ALL_STEPS
        if estimator.scheme == "trajectory":
            return self._along(trajectory, estimator, model, entropy_gradient)
        plan, rows = estimator.plan(trajectory), torch.arange(len(trajectory))
        masks_RS = plan.masks_BnS.flatten(0, 1).to(trajectory.ids.device)
        states = States(rows.repeat_interleave(estimator.draws).to(masks_RS.device), masks_RS, masks_RS)
        logp_RS, entropy_RS = self.read(trajectory, states, model=model, entropy_gradient=entropy_gradient)
        weight_BnS = plan.weight_BnS.to(logp_RS)
        logp_BnS = logp_RS.unflatten(0, (-1, estimator.draws))
        logp_BS, scale_BS = (weight_BnS * logp_BnS).sum(1), None
        entropy_BS = (weight_BnS * entropy_RS.unflatten(0, (-1, estimator.draws))).sum(1)
        if estimator.scheme == "truncated":
            # The published ratio is of the log-prob itself; the weight stands before the loss, not in the exponent.
            scale_BS = weight_BnS.sum(1)
            logp_BS, entropy_BS = (value / scale_BS.clamp_min(1e-12) for value in (logp_BS, entropy_BS))
        upper_BS = None
        if estimator.upper is not None:
            upper_BS = upper_log_probs(logp_BnS, weight_BnS, estimator.upper.beta)
        figures = plan_figures(plan, trajectory.target_mask, logp_BnS.detach())
        draws_Bn = (weight_BnS * logp_BnS).sum(-1) * estimator.draws
        return LogProbs(estimator.kind, logp_BS, entropy_BS, scale_BS, upper_BS, draws_Bn, figures)

    def read(
        self,
        trajectory: Trajectory,
        states: States,
        *,
        model: nn.Module | None = None,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [R, S] of the trajectory's tokens in each state where it is read, 0 elsewhere."""
        span = _one_span(trajectory)
        hidden_KNH = self._hidden_at(trajectory, states, span, model)
        row_N, at_N = _places(states)
        support = None if trajectory.support is None else trajectory.support[row_N, at_N]
        tokens_N = trajectory.ids[row_N, at_N]
        logp_N, entropy_N = self.decide(span.law, hidden_KNH, tokens_N, support, entropy_gradient=entropy_gradient)
        blank_RS = logp_N.new_zeros(states.read_RS.shape)
        return blank_RS.masked_scatter(states.read_RS, logp_N), blank_RS.masked_scatter(states.read_RS, entropy_N)

    def sequence_log_probs(self, batch: SequenceBatch, *, model: nn.Module | None = None) -> Tensor:
        """Log-probs [B, T] of the supervised targets that are masked, each over its own modality's slice."""
        if batch.noised_BT is None:
            raise ValueError(
                "a masked policy learns from masked sequences, and the batch does not say where; noise it first"
            )
        hidden_BTH = self.hidden(batch.ids_BT.masked_fill(batch.noised_BT, self.mask), batch.mask_BT, model=model)
        logp_BT = hidden_BTH.new_zeros(batch.ids_BT.shape, dtype=torch.promote_types(hidden_BTH.dtype, torch.float32))
        for modality, vocabulary in ((TEXT, self.layout.text), (IMAGE, self.layout.image)):
            where = batch.target_BT & batch.noised_BT & (batch.modality_BT == modality)
            if where.any() or self.in_parts:
                hidden_1NH, tokens_N = hidden_BTH[where].unsqueeze(0), batch.ids_BT[where]
                logp_N, _ = self.decide(Law(vocabulary), hidden_1NH, tokens_N)
                logp_BT = logp_BT.masked_scatter(where, logp_N)
        return logp_BT

    def _along(
        self, trajectory: Trajectory, estimator: Estimator, model: nn.Module | None, entropy_gradient: bool
    ) -> LogProbs:
        span = _one_span(trajectory)
        weight_BS = step_weights(trajectory, estimator.steps).to(trajectory.ids.device)
        states = trajectory_states(trajectory, weight_BS > 0)
        if span.unmasking is None or span.unmasking.policy_free or not estimator.order_term:
            logp_RS, entropy_RS = self.read(trajectory, states, model=model, entropy_gradient=entropy_gradient)
        else:
            logp_RS, entropy_RS = self._confident(trajectory, states, span, span.unmasking, model)
            entropy_RS = entropy_RS if entropy_gradient else entropy_RS.detach()
        blank_BS = logp_RS.new_zeros(trajectory.ids.shape)
        logp_BS = blank_BS.index_add(0, states.row_R, logp_RS)
        entropy_BS = blank_BS.index_add(0, states.row_R, entropy_RS)
        scale_BS = None if estimator.steps is None else weight_BS.to(logp_BS)
        figures = {} if trajectory.order_logp is None else order_figures(trajectory)
        return LogProbs(estimator.kind, logp_BS, entropy_BS, scale_BS, figures=figures)

    def _confident(
        self, trajectory: Trajectory, states: States, span: Span, unmasking: Unmasking, model: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        """As `read`, with each step's order log-prob in equal parts on the tokens it revealed."""
        if not unmasking.exact or span.law.truncated:
            raise ValueError(
                f"the log-prob of a trajectory with order {unmasking.order!r} and top_k={span.law.top_k}, "
                f"top_p={span.law.top_p} is not known (proposals that noise put aside, and supports of what was "
                "not kept, are not stored); train with order random, blocks, ancestral, or confidence without top-k "
                "and top-p"
            )
        everything = States(states.row_R, states.masked_RS, states.masked_RS)
        state_N, at_N = states.masked_RS.nonzero(as_tuple=True)
        chosen_N, entropy_N, order_R = self.transitions(
            span.law,
            unmasking,
            self._hidden_at(trajectory, everything, span, model),
            trajectory.ids[states.row_R[state_N], at_N],
            state_N,
            states.read_RS[state_N, at_N],
            len(states.row_R),
        )
        share_R1 = (order_R / states.read_RS.sum(1).clamp(min=1))[:, None]
        blank_RS = chosen_N.new_zeros(states.read_RS.shape)
        logp_RS = blank_RS.masked_scatter(states.masked_RS, chosen_N) + share_R1
        entropy_RS = blank_RS.masked_scatter(states.masked_RS, entropy_N)
        return torch.where(states.read_RS, logp_RS, 0.0), torch.where(states.read_RS, entropy_RS, 0.0)

    def transitions(
        self,
        law: Law,
        unmasking: Unmasking,
        hidden_KNH: Tensor,
        tokens_N: Tensor,
        state_N: Tensor,
        kept_N: Tensor,
        states: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and entropies [N] of tokens at all masked positions of some states, and the log-prob [states] of
        which of them each state kept. Every proposal is held, [N, V].

        Args:
            hidden_KNH: of the streams that the law's replay needs, in its order; state by state, in the order of their
                positions.
            tokens_N: token ids inside `law.vocabulary`; any where not kept.
            state_N: the state that each position is of.
            kept_N: whether it was decided in this state.
        """
        names, token_N = law.streams(replay=True), tokens_N - law.vocabulary[0]
        by_stream = dict(zip(names, self.head(hidden_KNH, law.vocabulary), strict=True))
        logp_NV, _ = law_log_probs(law, by_stream, replay=True)
        del by_stream
        order_R = order_log_probs(unmasking, logp_NV, token_N, state_N, kept_N, states)
        chosen_N = logp_NV.gather(1, token_N[:, None]).squeeze(1)
        return chosen_N, -(logp_NV.exp() * logp_NV).sum(1), order_R

    def _hidden_at(self, trajectory: Trajectory, states: States, span: Span, model: nn.Module | None) -> Tensor:
        """Hidden states [K, N, H] where the states are read, by one forward of all states and streams."""
        names = streams_needed(trajectory)
        width = max(trajectory.streams[name].ids_BP.shape[1] for name in names)
        response_RS = trajectory.ids[states.row_R].masked_fill(states.masked_RS, self.mask)
        seen_RS = trajectory.attention_mask[states.row_R]
        ids, masks = [], []
        for name in names:
            stream = trajectory.streams[name].rows(states.row_R)
            grow = (width - stream.ids_BP.shape[1], 0)
            ids.append(torch.cat([nn.functional.pad(stream.ids_BP, grow, value=self.layout.pad), response_RS], 1))
            masks.append(torch.cat([nn.functional.pad(stream.mask_BP, grow), seen_RS], 1))
        hidden = self.hidden(torch.cat(ids), torch.cat(masks), model=model)[:, width:].unflatten(0, (len(names), -1))
        return torch.stack([hidden[names.index(name)][states.read_RS] for name in span.law.streams(replay=True)])


def trajectory_states(trajectory: Trajectory, wanted_BS: Tensor) -> States:
    """The states in which the decisions `wanted_BS` were made: everything decided then or later is masked."""
    wanted_BS = wanted_BS & trajectory.target_mask
    steps = int(trajectory.step.max()) + 1
    step_BS = trajectory.step.long()
    present_BT = torch.zeros(len(trajectory), steps, dtype=torch.bool, device=step_BS.device)
    row_N, at_N = wanted_BS.nonzero(as_tuple=True)
    present_BT[row_N, step_BS[row_N, at_N]] = True
    row_R, step_R = present_BT.nonzero(as_tuple=True)
    target_RS, reached_RS = trajectory.target_mask[row_R], step_BS[row_R] - step_R[:, None]
    return States(row_R, target_RS & (reached_RS >= 0), target_RS & (reached_RS == 0))


def _places(states: States) -> tuple[Tensor, Tensor]:
    """Row of the trajectory and position of each decision that is read."""
    state_N, at_N = states.read_RS.nonzero(as_tuple=True)
    return states.row_R[state_N], at_N


def _one_span(trajectory: Trajectory) -> Span:
    if len(trajectory.spans) != 1:
        raise ValueError(f"a masked policy reads one span, and the trajectory has {len(trajectory.spans)}")
    return trajectory.spans[0]
