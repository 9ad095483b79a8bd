"""What vLLM loads in each of its processes, through the entry-point group `vllm.general_plugins`."""

from typing import Any

from rollouts.contract import Layout

STREAMS = 2
"""What one request of the two-stream model carries."""
TWO_STREAMS = "RlmmTwoStreamLlama"
MODELS: dict[str, str] = {TWO_STREAMS: "rollouts.vllm_engine.two_streams:TwoStreamLlama"}
"""Architectures that stock vLLM lacks: the name in a checkpoint's config.json -> "module:Class"."""


def register() -> None:
    """Make the architectures of `MODELS` known to vLLM. May be called many times."""
    from vllm import ModelRegistry

    for architecture, target in MODELS.items():
        ModelRegistry.register_model(architecture, target)


def two_stream_overrides(layout: Layout) -> dict[str, Any]:
    """What a Llama's config.json must say, beside what it says, to be served as the two-stream model.

    Raises ValueError for a layout whose unconditional stream is no function of the tokens."""
    if layout.null_token is None:
        raise ValueError(
            "the layout has a null prompt and no null token, so two streams in one request are not possible; set "
            "engine.two_streams: false"
        )
    null = {"text": list(layout.text), "given": list(layout.given()), "token": layout.null_token}
    return {"architectures": [TWO_STREAMS], "rollouts_null": null}
