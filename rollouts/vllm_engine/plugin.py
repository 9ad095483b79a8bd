"""What vLLM loads in each of its processes, through the entry-point group `vllm.general_plugins`."""

from typing import Any

from rollouts.contract import Layout

WORKER = "rollouts.vllm_engine.device.DeviceWorker"
"""vLLM's `worker_cls`: on a CPU one that takes several steps a turn (`steps`)."""
STREAMS = 2
"""What one request of the two-stream model carries."""
TWO_STREAMS = "RlmmTwoStreamLlama"
LLAMAGEN_TEXT = "RlmmLlamaGenText"
"""LlamaGen of text: its class in transformers is that of LlamaGen of classes."""
MODELS: dict[str, str] = {
    TWO_STREAMS: "rollouts.vllm_engine.two_streams:TwoStreamLlama",
    "Emu3ForConditionalGeneration": "rollouts.vllm_engine.families:Emu3",
    "ChameleonForConditionalGeneration": "rollouts.vllm_engine.families:Chameleon",
    "JanusForConditionalGeneration": "rollouts.vllm_engine.families:Janus",
    "LlamaGenForImageGeneration": "rollouts.vllm_engine.llamagen:LlamaGen",
    LLAMAGEN_TEXT: "rollouts.vllm_engine.llamagen:LlamaGenText",
    "GlmImageForConditionalGeneration": "rollouts.vllm_engine.glm_image:GlmImage",
}
"""Architectures that stock vLLM lacks: the name in a checkpoint's config.json -> "module:Class"."""


def register() -> None:
    """Make the architectures of `MODELS` known to vLLM. May be called many times."""
    from vllm import ModelRegistry

    from rollouts.vllm_engine.configs import register_configs

    register_configs()
    for architecture, target in MODELS.items():
        ModelRegistry.register_model(architecture, target)


def served_overrides(layout: Layout, config: Any, architecture: str, *, together: bool) -> dict[str, Any]:
    """What a checkpoint's config.json must say to vLLM beside what it says.

    Args:
        config: the checkpoint's, as transformers reads it.
        architecture: the model's class.
        together: serve the model that carries both streams of a guided sample, where there is one.
    """
    if together and layout.null_token is not None and architecture == "LlamaForCausalLM":
        return two_stream_overrides(layout)
    found: dict[str, Any] = {}
    text = config.get_text_config()
    if text.vocab_size < layout.vocab_size:  # codes that the text's vocabulary does not hold, or the other way round
        whole: dict[str, Any] = {"vocab_size": layout.vocab_size}
        found = whole if text is config else {"text_config": whole}
    if getattr(config, "caption_config", None) is not None:
        # M-RoPE's sections are how vLLM knows to ask the model for positions.
        rope = {**config.rope_parameters, "mrope_section": [1, 1, 1]}
        found |= {"architectures": [LLAMAGEN_TEXT], "rope_parameters": rope}
    if architecture == "GlmImageForConditionalGeneration":
        grid = layout.grid
        found["rollouts_grid"] = {
            "rows": grid.rows, "cols": grid.cols, "preview": grid.preview, "image": list(layout.image),
        }  # fmt: skip
    return found


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
