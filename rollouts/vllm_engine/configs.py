"""Configurations of checkpoints whose class is the trainer's own, for vLLM's processes, which do not load it."""

from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig


class LlamaGenConfig(LlamaConfig):
    """What config.json says, as attributes."""

    model_type = "llamagen"


def register_configs() -> None:
    """Make their names known to transformers, where they are not. May be called many times."""
    if LlamaGenConfig.model_type not in CONFIG_MAPPING:
        AutoConfig.register(LlamaGenConfig.model_type, LlamaGenConfig)
