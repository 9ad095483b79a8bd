"""A process that is not the first of its group writes files of its own, too."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.distributed import mixin

from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.families import loading
from rlmm.policies.families.loading import load_policy, tiny_folder
from rlmm.policies.saving import by_this_process


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the second one of a group, as transformers asks."""
    monkeypatch.setattr(mixin, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(mixin, "_get_torch_distributed_rank", lambda: 1)
    yield


def test_a_tiny_policy_is_there_in_every_process(second: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "_made", loading._made.__wrapped__)  # no process has made it yet
    folder = tiny_folder(CheckpointPolicy(path="tiny", tiny=True, family="janus", image_size=(48, 48)))
    policy = load_policy(folder)
    policy.save(tmp_path / "left")
    assert not (tmp_path / "left" / "model.safetensors").exists(), "the first process saves a stage's"
    with by_this_process():
        policy.save(tmp_path / "own")
    assert load_policy(tmp_path / "own").layout == policy.layout
    assert "should_save_on_this_rank" not in vars(PreTrainedModel) and not dist.is_initialized()
