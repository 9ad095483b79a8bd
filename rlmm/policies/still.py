"""A copy of a policy that stands still while the policy itself is trained: what training changes is copied, the rest is
shared."""

import torch

from rlmm.policies.head_rows import forget_rows
from rlmm.policies.transformer import TransformerPolicy


class Still:
    """`policy`: the copy, without gradients and in evaluation mode; it has the weights of the last `take`. Under LoRA
    only the adapter is held twice."""

    def __init__(self, live: TransformerPolicy) -> None:
        # A head of which some rows are trained is frozen, and shares their storage.
        trained = {p.untyped_storage().data_ptr() for p in live.model.parameters() if p.requires_grad}
        every = dict(live.model.named_parameters())
        changed = {name: p for name, p in every.items() if p.untyped_storage().data_ptr() in trained}
        self.live, self.policy = live, live.copied([p for name, p in every.items() if name not in changed])
        forget_rows(self.policy.model)
        own = dict(self.policy.model.named_parameters())
        self._pairs = [(p, own[name].requires_grad_(False)) for name, p in changed.items() if name in own]
        self.policy.model.eval()

    @torch.no_grad()
    def take(self) -> None:
        """Take the weights that the policy has now, to the device where it is now."""
        self.policy.to(self.live.base.device)
        for live, own in self._pairs:
            own.copy_(live)
