"""Memory that is out in the middle of a rollout of a vLLM in this process; needs no vLLM."""

import sys
from typing import Any, cast

import pytest
import torch

from rollouts.vllm_engine.host import Room
from rollouts.vllm_engine.local import LocalHost


class Raising:
    """vLLM's LLM, as far as a rollout reads it."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.llm_engine = self
        self.has_unfinished_requests = lambda: False

    def generate(self, *_: Any, **__: Any) -> Any:
        raise self.error


def rollout(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    host = cast(Any, object.__new__(LocalHost))
    host.llm, host.room, host._asleep = Raising(error), Room(4, 64, 9, 77), False
    monkeypatch.setitem(sys.modules, "vllm", cast(Any, type("vllm", (), {"SamplingParams": dict})))
    processor = type("processor", (), {"on_processor": None})
    monkeypatch.setitem(sys.modules, "rollouts.vllm_engine.processor", cast(Any, processor))
    host.run([], [])


def test_memory_that_is_out_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    says = r"lower engine\.kv_megabytes.*77 positions \(engine\.max_length\)\. vLLM: CUDA out of memory"
    with pytest.raises(ValueError, match=says):
        rollout(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), monkeypatch)


def test_another_error_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="^no such device$"):
        rollout(RuntimeError("no such device"), monkeypatch)
