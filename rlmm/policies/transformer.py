"""What every family on a transformers model has in common: its weights, its adapter, its files, its head.

A family adds how a trajectory is read: `hidden`, `log_probs`, `sequence_log_probs`.
"""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlmm.config.base import nearest
from rlmm.config.policy import Lora
from rlmm.objectives.estimators import Estimator
from rlmm.objectives.legality import LogProbKind
from rlmm.policies.base import LogProbs, SequenceBatch
from rlmm.policies.casting import cast_inside
from rlmm.policies.full_weights import full_weights, refuse_tied, weights_apart
from rlmm.policies.head import OutputHead, decision_log_probs, sliced_head
from rlmm.policies.head_rows import train_rows
from rlmm.policies.layout_io import save_layout
from rlmm.policies.parts import in_parts, settle, whole
from rlmm.policies.pictures import Pictures
from rlmm.policies.spelling import Spelling
from rollouts.contract import Layout
from rollouts.law import Law
from rollouts.trajectory import Trajectory


class TransformerPolicy(ABC):
    """A transformers model whose vocabulary holds text and image codes. A family of checkpoints overrides what is its
    own: how tokens are embedded, which head decides them, which parts of the model take no part."""

    log_prob_kind: LogProbKind
    frozen_parts: tuple[str, ...] = ()
    """Name prefixes of parameters that no stage trains and no engine is handed (image tokenizers, encoders)."""
    read_parts: tuple[str, ...] = ()
    """Of those, the ones that prompts are read with."""
    untrained_parts: tuple[str, ...] = ()
    """Of those that sampling may need and that no image token depends on."""
    projections: Mapping[str, str] = MappingProxyType({})
    """What the model calls the projections of a Llama that `lora.target_modules` names, where it has other names."""
    pictures: Pictures | None = None
    """Source images that it sees through an encoder of its own; None where they are codes to it."""

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
        self.model, self.tokenizer, self.layout = model, tokenizer, layout
        self.precision = "float32"
        self._frozen: nn.Module | None = None
        self._swapped: nn.Module | None = None
        for name, parameter in self.base.named_parameters():
            if name.startswith((*self.frozen_parts, *self.untrained_parts)):
                parameter.requires_grad_(False)
        without_dropout(self.base)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, LoRA layers inside it where there are any."""
        active = self._swapped if self._swapped is not None else self.model
        return cast(PreTrainedModel, active.get_base_model() if isinstance(active, PeftModel) else active)

    @property
    def sizes(self) -> Any:
        """The configuration of the language model, which in some checkpoints is a part of the whole one's."""
        return self.base.config.get_text_config()

    @property
    def spelling(self) -> Spelling:
        return Spelling(self.tokenizer, self.layout, self.sizes.max_position_embeddings)

    @property
    def in_parts(self) -> bool:
        """Whether weights are kept in parts: then all processes must use the same heads, with or without a token."""
        return any(in_parts(parameter) for parameter in self.model.parameters())

    @property
    def gathering(self) -> nn.Module | None:
        """See `Policy`. Where weights are in parts a pass of DeepSpeed's begins with the outermost module's forward."""
        active = self.model if self._swapped is None else self._swapped
        return active if any(in_parts(parameter) for parameter in active.parameters()) else None

    def to(self, device: torch.device) -> None:
        """Move the weights, in place."""
        nn.Module.to(self.model, device)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt's text; UnusablePrompt where the tokenizer does not know a character."""
        return self.spelling.encode(prompt)

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor, *, cache: Any = None, model: nn.Module | None = None) -> Tensor:
        """Final hidden states [B, T, H] of whole sequences; with a cache, of the positions that it lacks alone."""
        device, most = self.base.device, self.sizes.max_position_embeddings
        if mask_BT.shape[1] > most:
            raise ValueError(
                f"a sequence of {mask_BT.shape[1]} tokens (prompt and image) exceeds the model's {most} positions; "
                "shorten the prompts (data.max_prompt_characters) or raise policy.max_positions"
            )
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        held = 0 if cache is None else cache.get_seq_length()
        inputs: dict[str, Any] = {
            **self.embedded(ids_BT[:, held:]),
            "attention_mask": self.attention(ids_BT, mask_BT, held),
            "position_ids": self.positions(ids_BT, mask_BT)[..., held:],
        }
        # The body alone is cast, here, for sampler and trainer alike: head and softmax keep the weights' own.
        with cast_inside(self.base.base_model, device.type, self.precision == "bfloat16"):
            if model is None:
                output = self.base.base_model(**inputs, past_key_values=cache, use_cache=cache is not None)
                return output.last_hidden_state.to(self.base.dtype)
            # A wrapper's hooks (gradient reduction, parameter gathering) fire only when its own forward runs; one
            # position of logits is the cheapest the head offers.
            output = model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        return output.hidden_states[-1].to(self.base.dtype)

    def positions(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Positions [..., B, T] as the model's forward takes them: they count real tokens."""
        return (mask_BT.long().cumsum(-1) - 1).clamp_min(0)

    def embedded(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """Tokens as the model's forward takes them."""
        return {"input_ids": ids_BT}

    def attention(self, ids_BT: Tensor, mask_BT: Tensor, first: int = 0) -> Tensor:
        """What sees what in whole sequences: which positions are there [B, T], or what to add to the scores of those
        from `first` on [B, 1, T - first, T]."""
        return mask_BT

    def added_to_scores(self, seen_BQT: Tensor) -> Tensor:
        """0 where a position sees another and -inf where not [B, 1, Q, T], in what the body computes in. From a bool
        mask every layer would make this for itself, and keep it for the backward."""
        dtype = torch.bfloat16 if self.precision == "bfloat16" else self.base.dtype
        return torch.zeros(seen_BQT.shape, dtype=dtype, device=seen_BQT.device).masked_fill(~seen_BQT, -torch.inf)[
            :, None
        ]

    def output_head(self, vocabulary: tuple[int, int]) -> OutputHead:
        """Which head decides the tokens of a slice."""
        return OutputHead(cast(nn.Module, self.base.get_output_embeddings()))

    def decide(
        self,
        law: Law,
        hidden_KNH: Tensor,
        tokens_N: Tensor,
        support_NC: Tensor | None = None,
        *,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N] of chosen tokens: see `head.decision_log_probs`."""
        settle(self.model)
        head = self.output_head(law.vocabulary)
        return decision_log_probs(head, law, hidden_KNH, tokens_N, support_NC, entropy_gradient=entropy_gradient)

    @abstractmethod
    def log_probs(
        self,
        trajectory: Trajectory,
        *,
        model: nn.Module | None = None,
        entropy_gradient: bool = False,
        estimator: Estimator | None = None,
    ) -> LogProbs:
        """See `Policy`."""

    @abstractmethod
    def sequence_log_probs(self, batch: SequenceBatch, *, model: nn.Module | None = None) -> Tensor:
        """See `Policy`."""

    def image_hidden(self, trajectory: Trajectory) -> Tensor:
        """See `Policy`. Raises ValueError for a family that is not read in one pass."""
        raise ValueError(f"a {type(self).__name__} reads no image in one pass, so no codec can draw its hidden states")

    def head(self, hidden_NH: Tensor, vocabulary: tuple[int, int]) -> Tensor:
        settle(self.model)
        return sliced_head(self.output_head(vocabulary), hidden_NH, vocabulary)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full weights under the checkpoint's names, one at a time (`full_weights`)."""
        settle(self.model)
        return full_weights(self.base, self.frozen_parts)

    def weights_apart(self) -> Iterator[tuple[str, Tensor]]:
        """The same weights and their adapters apart, one at a time (`weights_apart`)."""
        settle(self.model)
        return weights_apart(self.base, self.frozen_parts)

    def whole(self) -> AbstractContextManager[None]:
        """See `Policy`."""
        return whole(self.model)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The policy before this stage, or the one it is held against: what `freeze_reference` was given or copied, or
        the adapter switched off."""
        if self._frozen is None and isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield
            return
        if self._frozen is None:
            raise RuntimeError("no reference: call `freeze_reference` before training all weights with a KL term")
        self._swapped = self._frozen
        try:
            yield
        finally:
            self._swapped = None

    def train_image_rows(self) -> None:
        """Of the head train only the rows of image codes, for a stage that decides nothing else: less memory, and the
        same weights where weight decay is 0. Nothing to do under LoRA or where head and embedding are one matrix."""
        found = self.output_head(self.layout.image)
        head, rows = found.linear, tuple(token - found.first for token in self.layout.image)
        tied = head.get_parameter("weight") is self.base.get_input_embeddings().weight
        whole = isinstance(head, nn.Linear) and rows == (0, head.out_features)
        if isinstance(head, nn.Linear) and not isinstance(self.model, PeftModel) and not tied and not whole:
            train_rows(head, (rows[0], rows[1]))

    def freeze_reference(self, other: nn.Module | None = None) -> None:
        """Keep the model `other` as the reference, or a frozen copy of the present weights: nothing to do under LoRA,
        where switching the adapter off gives them."""
        if other is not None:
            self._frozen = other.eval().requires_grad_(False)
        elif not isinstance(self.model, PeftModel):
            self._frozen = copy.deepcopy(self.model).eval().requires_grad_(False)

    def copied(self, shared: Iterable[nn.Parameter]) -> Self:
        """A copy with weights of its own but for these, which it shares; and it has the same reference and pictures."""
        memo: dict[int, Any] = {id(one): one for one in shared}
        if self.pictures is not None:
            memo[id(self.pictures)] = self.pictures
        if self._frozen is not None:
            memo[id(self._frozen)] = self._frozen
        return copy.deepcopy(self, memo)

    def add_lora(self, config: Lora, seed: int) -> None:
        """Wrap the model in a fresh LoRA adapter, whose weights are a function of `seed`."""
        targets = list(dict.fromkeys(self.projections.get(name, name) for name in config.target_modules))
        linear = [name for name, module in self.base.named_modules() if isinstance(module, nn.Linear)]
        known = {name.rsplit(".", 1)[-1] for name in linear if not name.startswith(self.frozen_parts)}
        unknown = [name for name in targets if name not in known]
        if unknown:
            raise ValueError(f"lora.target_modules names {unknown[0]!r}.{nearest(unknown[0], sorted(known))}")
        settings = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=targets,
            exclude_modules="|".join(self._without_adapter(linear)) or None,
            # PEFT's causal class asks for what only models that go from left to right have.
            task_type="CAUSAL_LM" if hasattr(self.base, "prepare_inputs_for_generation") else None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = get_peft_model(self.base, settings)
        refuse_tied(self.base.get_output_embeddings(), self.base.get_input_embeddings())

    def _without_adapter(self, linear: list[str]) -> list[str]:
        """Patterns of the layers that take none: those with no part in drawing, and a head that shares its name with a
        projection (LLaDA's)."""
        head = self.base.get_output_embeddings()
        names = [name for name in linear if self.base.get_submodule(name) is head]
        shared = [n for n in names if sum(name.rsplit(".", 1)[-1] == n.rsplit(".", 1)[-1] for name in linear) > 1]
        return [*(rf"{re.escape(part)}.*" for part in self.frozen_parts), *map(re.escape, shared)]

    def save(self, folder: Path) -> None:
        """The full model, an adapter folded into a copy of it, with tokenizer and layout, in transformers' files."""
        model = self.model
        if isinstance(model, PeftModel):
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(folder)
        self._save_rest(folder)

    def save_adapter(self, folder: Path, base: str) -> None:
        """The adapter alone as plain PEFT files; `base` is the model it belongs to (a folder or hub id)."""
        if not isinstance(self.model, PeftModel):
            raise ValueError("this policy has no adapter: its stage trained all weights; export the merged model")
        self.model.peft_config["default"].base_model_name_or_path = base
        # The vocabulary is the base's own: without this PEFT looks the base up to find that out.
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        self._save_rest(folder)

    def _save_rest(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        save_layout(self.layout, folder)


def without_dropout(model: nn.Module) -> None:
    """Sampled is without dropout, so a loss under dropout would be of another law. Emu3's configuration says 0.1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # pyrefly: ignore
