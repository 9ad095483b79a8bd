"""The reference of a DPO stage: log-probs read once and kept on disk, or a policy that is held beside the trained one.

Shapes: N items of K preferences with s sides each.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlmm.config.preference import DpoStage
from rlmm.config.recipe import OWN_POLICY
from rlmm.policies.base import Policy
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.context import StageContext, own_policy, parent, placed, run_codec, stage_policy
from rlmm.train.dpo_source import Item
from rlmm.train.preferences import Preference, preference_batch, sequence_log_probs
from rlmm.train.processes import device, wait, world
from rlmm.train.signals import asked, stop_if_asked
from rollouts.fingerprint import weights_fingerprint

CHUNK: int = 64
"""Micro-batches of a file of log-probs."""


def other_reference(context: StageContext) -> TransformerPolicy | None:
    """The policy that `reference` names, where it is not the one that the stage starts from."""
    config: DpoStage = context.config
    named = None if config.reference == OWN_POLICY else config.reference
    if config.reference is None or named == parent(context):
        return None
    policy = own_policy(context, run_codec(context)) if named is None else stage_policy(context, named)
    return placed(context, policy, config.precision)


def keep_reference(context: StageContext, policy: TransformerPolicy) -> None:
    """Hold the reference beside the policy, for what has to be read at every step: a frozen copy, or under LoRA the
    policy with its adapter off."""
    other = other_reference(context)
    policy.freeze_reference(None if other is None else other.model)


def stored_reference(context: StageContext, policy: TransformerPolicy, items: Sequence[Item]) -> Tensor:
    """The reference's log-probs [N, K, s] (float64), read once: reference/*.safetensors in the stage's folder, which
    a resumed stage goes on with. Processes read a part each.

    Raises ValueError where the files are of another reference or of other preferences; Stopped after a file where the
    run was asked to stop.
    """
    other, size = other_reference(context), context.config.micro_batch_size
    reader = policy if other is None else other
    flat = [one for item in items for one in item]
    each = CHUNK * size
    chunks = [flat[at : at + each] for at in range(0, len(flat), each)]
    mark = _mark(reader, flat, each)
    rank, processes = world()
    folder = context.folder / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    # With its adapter off the policy is the one that it started as; without an adapter it is that still.
    with policy.reference() if other is None and isinstance(policy.model, PeftModel) else nullcontext():
        for number in range(rank, len(chunks), processes):
            path = _path(folder, number)
            if not path.is_file() and not asked():
                _write(path, _log_probs(reader, chunks[number], size), mark)
    stop_if_asked()
    wait()
    logp_Fs = torch.cat([_read(_path(folder, number), mark) for number in range(len(chunks))])
    return logp_Fs.unflatten(0, (len(items), -1))


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


@torch.no_grad()
def _log_probs(policy: Policy, preferences: Sequence[Preference], size: int) -> Tensor:
    parts = []
    for at in range(0, len(preferences), size):
        some = preferences[at : at + size]
        batch = preference_batch(policy.layout, some, [1.0] * len(some)).to(device())
        parts.append(sequence_log_probs(policy, batch).squeeze(1).unflatten(0, (batch.sides, -1)).T.cpu().double())
    return torch.cat(parts).contiguous()


def _write(path: Path, logp_Fs: Tensor, mark: str) -> None:
    partial = path.with_suffix(".partial")
    save_file({"log_probs": logp_Fs}, partial, metadata={"of": mark})
    os.replace(partial, path)


def _read(path: Path, mark: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            found, logp_Fs = (file.metadata() or {}).get("of"), file.get_tensor("log_probs")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no readable file of log-probs ({error}); delete it, and it is made again"
        ) from error
    if found != mark:
        raise ValueError(
            f"{path} holds log-probs of another reference or of other preferences than this stage has now; put them "
            f"back as they were, or delete {path.parent} to begin the stage anew"
        )
    return logp_Fs


def _mark(policy: TransformerPolicy, preferences: Sequence[Preference], each: int) -> str:
    """What the files are a function of: the reference's weights, every token, and how many preferences a file has."""
    digest = hashlib.sha256(weights_fingerprint(policy.named_weights(), policy.base.dtype).encode())
    digest.update(str(each).encode())
    for one in preferences:
        for side in one.sides:
            parts = (side.prompt, side.text, [] if side.image is None else side.image, *side.sources)
            digest.update(repr([list(part) for part in parts]).encode())
    return digest.hexdigest()
