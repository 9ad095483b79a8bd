"""What a vLLM that shares a GPU with training is told; needs neither."""

from pathlib import Path

import pytest
import torch

from rollouts.vllm_engine.launch import ServerPlan, surroundings, visible_device


@pytest.mark.parametrize(("named", "seen"), [(None, "1"), ("", "1"), ("4, 6", "6"), ("GPU-a,GPU-b", "GPU-b")])
def test_a_server_sees_the_gpu_of_the_process_that_started_it(
    named: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    device = visible_device(torch.device("cuda", 1))
    assert device == seen and surroundings("key", device)["CUDA_VISIBLE_DEVICES"] == seen


def test_a_server_elsewhere_sees_what_its_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert visible_device(torch.device("cpu")) is None
    assert surroundings("key")["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_vllm_does_not_ask_for_the_memory_that_training_holds() -> None:
    """Stock vLLM asks for 0.92 of the device to be free, even where the size of its cache is given."""
    command = ServerPlan(Path("model"), max_length=9).command(81)
    given = dict(zip(command, command[1:], strict=False))
    assert float(given["--gpu-memory-utilization"]) < 0.05 and int(given["--kv-cache-memory-bytes"]) > 0
