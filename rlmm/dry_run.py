"""What an update holds, by making it on tensors that have shapes and no memory.

The policy's own model, head and optimizer run under PyTorch's FakeTensorMode, and every storage is counted from when it
is made to when nothing refers to it. So attention, grouped heads, LoRA, gradient checkpointing and autocast are what
they are in a real update, and no formula has to know of them.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlmm.policies.masked import MaskedPolicy
from rlmm.policies.transformer import TransformerPolicy
from rollouts.law import Law
from rollouts.unmasking import Unmasking

NO_DRY_RUN = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""What a model raises whose forward asks for values."""


@dataclass(frozen=True)
class Reading:
    """What a masked policy reads at once. states: partly masked sequences of a stream. decisions: masked positions of
    all of them that the head reads. order: how a state's were chosen, where the log-prob of that is read with them."""

    states: int
    decisions: int
    order: Unmasking | None = None


@dataclass(frozen=True)
class Update:
    """A stage's update. rows: sequences of a micro-batch, `streams` for each decision. decided: positions at the end of
    an image's sequence that the head reads. again: whether a second micro-batch follows in the same step."""

    rows: int
    streams: int
    length: int
    decided: int
    again: bool
    precision: str
    checkpointing: bool
    image_rows: bool = False
    """Whether of the head only the rows of image codes are trained."""
    read: Reading | None = None
    """Of a masked policy's micro-batch. None: every decided position of every sequence."""
    gate: Reading | None = None
    """What a masked policy reads without gradient before the loss."""
    text: int = 0
    """Decisions of text in a micro-batch, beside those of images."""
    drawn: int | None = None
    """Sequences of a stream that end in an image; None: all."""
    entropy: bool = False
    """Whether the decisions' entropies have a gradient."""


@dataclass(frozen=True)
class Held:
    """Bytes: of all weights, of the trained ones' gradients and of the optimizer's state; `peak`: the most that an
    update holds beside the weights, those two among it; `passing`: the most that forward and backward hold beside the
    optimizer's state; `activations`: the most beside both. again: whether a second micro-batch was added to a first."""

    weights: int
    gradients: int
    optimizer: int
    peak: int
    passing: int
    activations: int
    again: bool = False

    @property
    def working(self) -> int:
        """What is left of the peak for activations and logits."""
        return max(0, self.peak - self.gradients - self.optimizer)


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make. `left_out`: name -> bytes that the `most` of that name leaves
    out from now on; no name, no count."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.left_out: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_storage(leaf).cdata for leaf in _dense((args, kwargs))}
        made = func(*args, **kwargs)
        for leaf in _dense(made):
            storage = _storage(leaf)
            # A view, or an operation in place, of what was there before.
            if storage.cdata not in given or storage.cdata in self._held:
                self._held[storage.cdata] = (storage, leaf.untyped_storage().nbytes())
        # What has been let go of is looked for only where it could matter.
        bound = sum(size for _, size in self._held.values())
        if bound > self.peak:
            self.peak = max(self.peak, self.live)
        for name, left_out in self.left_out.items():
            if bound - left_out > self.most.get(name, 0):
                self.most[name] = max(self.most.get(name, 0), self.live - left_out)
        return made

    @property
    def live(self) -> int:
        """Bytes held now."""
        self._held = {key: one for key, one in self._held.items() if not one[0].expired()}
        return sum(size for _, size in self._held.values())


def _dense(tree: Any) -> list[Tensor]:
    """Tensors with a storage: a packed one of oneDNN's has none that can be asked for."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


@contextmanager
def bare(make: Callable[[], TransformerPolicy], precision: str) -> Iterator[TransformerPolicy]:
    """The policy that `make` builds, and inside everything is made without memory."""
    with torch.device("meta"):
        policy = make()
    policy.precision = precision
    policy.pictures = None  # which tokens refer to one cannot be asked of tensors without values
    with warnings.catch_warnings(), FakeTensorMode():
        # Whether the head's trained rows still are its own is asked by address, which means nothing here and is equal.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        onto_cpu(policy.model)
        yield policy


def dry_run(make: Callable[[], TransformerPolicy], law: Law, update: Update) -> Held:
    """Two steps of the policy that `make` builds, the second one with the optimizer's state there from the first.

    `make` is called on the meta device, so it must load nothing; its model has an adapter where one is trained.
    """
    with bare(make, update.precision) as policy:
        weights = _bytes(list(policy.model.parameters()))  # rows of the head are a view of it
        if update.image_rows:
            policy.train_image_rows()
        if update.checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.model.train()
        trained = [weight for weight in policy.model.parameters() if weight.requires_grad]
        # As Trainer makes it.
        optimizer = torch.optim.AdamW(trained, fused=True)
        with Live() as live:
            for _ in range(2):
                for _ in range(1 + update.again):
                    _pass(policy, law, update, live, trained, _state(optimizer))
                live.left_out.clear()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return Held(weights, _bytes(trained), _state(optimizer), live.peak, **live.most, again=update.again)


def _pass(
    policy: TransformerPolicy, law: Law, update: Update, live: Live, trained: Sequence[Tensor], state: int
) -> None:
    """A micro-batch forth and back. A gradient counts as one from when it is its weight's own."""
    live.left_out |= {"passing": state, "activations": state}

    def count(weight: Tensor) -> None:
        live.left_out["activations"] += _bytes([weight])

    fresh = [weight for weight in trained if weight.grad is None]
    live.left_out["activations"] += _bytes([weight for weight in trained if weight.grad is not None])
    hooks = [weight.register_post_accumulate_grad_hook(count) for weight in fresh]
    _loss(policy, law, update).backward()
    for hook in hooks:
        hook.remove()


def _state(optimizer: torch.optim.Optimizer) -> int:
    return _bytes([leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor)])


def onto_cpu(model: nn.Module) -> None:
    """Tensors that operations take for a processor's, in place of those on the meta device; tied ones stay tied."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                held[name] = made[old]  # pyrefly: ignore[unsupported-operation]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def _loss(policy: TransformerPolicy, law: Law, update: Update) -> Tensor:
    """As a stage makes it, but for what is a number a position."""
    if update.gate is not None:
        with torch.no_grad():
            inputs = inputs_of(policy, update.gate.states * update.streams, update.length)
            _read(policy, law, body_hidden(policy, inputs), update.gate, update)
    hidden_BTH = _hidden(policy, update)
    parts: list[Tensor] = []
    if update.text:
        hidden_1NH = hidden_BTH.flatten(0, 1)[torch.arange(update.text)].unsqueeze(0)
        parts += _decided(policy, Law(policy.layout.text), hidden_1NH, update.entropy)
    if update.read is not None:
        parts += _read(policy, law, hidden_BTH, update.read, update)
    elif update.decided:
        hidden_KBTH = hidden_BTH.unflatten(0, (update.streams, -1))[:, : update.drawn]
        hidden_KNH = hidden_KBTH[:, :, -update.decided - 1 : -1].flatten(1, 2)
        parts += _decided(policy, law, hidden_KNH, update.entropy)
    return torch.stack([part.sum() for part in parts]).sum()


def _hidden(policy: TransformerPolicy, update: Update) -> Tensor:
    """Hidden states [rows, T, H], through the model as an update goes: with those of all layers, and one position of
    its own logits."""
    inputs = inputs_of(policy, update.rows, update.length)
    with torch.autocast("cpu", torch.bfloat16, enabled=update.precision == "bfloat16"):
        output = policy.model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    return output.hidden_states[-1].to(policy.base.dtype)


def body_hidden(policy: TransformerPolicy, inputs: Mapping[str, Any], cache: Any = None) -> Tensor:
    """Hidden states [rows, T, H] through the body alone, as where nothing is trained."""
    with torch.autocast("cpu", torch.bfloat16, enabled=policy.precision == "bfloat16"):
        output = policy.base.base_model(**inputs, past_key_values=cache, use_cache=cache is not None)
    return output.last_hidden_state.to(policy.base.dtype)


def inputs_of(policy: TransformerPolicy, rows: int, length: int, first: int = 0) -> dict[str, Any]:
    """What the forward of rows takes, of their positions from `first` on."""
    ids_BT = torch.zeros(rows, length, dtype=torch.long)
    mask_BT = torch.ones(rows, length, dtype=torch.bool)
    # Which sees which, said outright, as where rows are padded: it cannot be asked of tensors without values.
    seen = torch.ones(rows, length - first, length, dtype=torch.bool)
    own = policy.layout.mask is not None and not policy.layout.causal_prompt  # then each layer makes its own of it
    return {
        **policy.embedded(ids_BT[:, first:]),
        "attention_mask": seen[:, None] if own else policy.added_to_scores(seen),
        "position_ids": policy.positions(ids_BT, mask_BT)[..., first:],
    }


def _read(policy: TransformerPolicy, law: Law, hidden_BTH: Tensor, reading: Reading, update: Update) -> list[Tensor]:
    """Of a masked policy's states as `_decided`."""
    read_N = torch.arange(reading.decisions)
    hidden_KNH = torch.stack([one.flatten(0, 1)[read_N] for one in hidden_BTH.unflatten(0, (update.streams, -1))])
    if reading.order is None:
        return _decided(policy, law, hidden_KNH, update.entropy)
    assert isinstance(policy, MaskedPolicy), "no other has an order"
    tokens_N = torch.full((reading.decisions,), law.vocabulary[0])
    state_N, kept_N = torch.zeros_like(tokens_N), torch.ones(reading.decisions, dtype=torch.bool)
    chosen_N, entropy_N, order_R = policy.transitions(
        law, reading.order, hidden_KNH, tokens_N, state_N, kept_N, reading.states
    )
    return [chosen_N + order_R.sum(), *[entropy_N] * update.entropy]


def _decided(policy: TransformerPolicy, law: Law, hidden_KNH: Tensor, entropy: bool) -> list[Tensor]:
    """What a loss is made of: log-probs [N], and with `entropy` entropies."""
    decisions, codes = hidden_KNH.shape[1], law.vocabulary[1] - law.vocabulary[0]
    support_NC = torch.zeros(decisions, -(-codes // 8), dtype=torch.uint8) if law.truncated else None
    tokens_N = torch.full((decisions,), law.vocabulary[0])
    logp_N, entropy_N = policy.decide(law, hidden_KNH, tokens_N, support_NC, entropy_gradient=entropy)
    return [logp_N, *[entropy_N] * entropy]
