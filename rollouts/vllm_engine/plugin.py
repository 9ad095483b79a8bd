"""What vLLM loads in each of its processes, through the entry-point group `vllm.general_plugins`."""

MODELS: dict[str, str] = {}
"""Architectures that stock vLLM lacks: the name in a checkpoint's config.json -> "module:Class".

A Llama-style policy is stock and needs none."""


def register() -> None:
    """Make the architectures of `MODELS` known to vLLM. May be called many times; without any it imports nothing."""
    if not MODELS:
        return
    from vllm import ModelRegistry

    for architecture, target in MODELS.items():
        ModelRegistry.register_model(architecture, target)
