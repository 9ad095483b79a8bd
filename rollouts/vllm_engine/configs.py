"""Configurations of checkpoints whose class is the trainer's own, for vLLM's processes, which do not load it."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, T5Config

from rollouts.captions import Conditions


class LlamaGenConfig(Conditions, LlamaConfig):
    """What config.json says, as attributes."""

    model_type = "llamagen"
    sub_configs = {"caption_config": T5Config}  # noqa: RUF012 (transformers' own attribute)

    num_classes: int = 1000
    grid_size: int = 16
    caption_config: Any = None
    caption_tokens: int = 120

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.caption_config, dict):
            self.caption_config = T5Config(**self.caption_config)
        super().__post_init__(**kwargs)


def register_configs() -> None:
    """Make their names known to transformers, where they are not. May be called many times."""
    if LlamaGenConfig.model_type not in CONFIG_MAPPING:
        AutoConfig.register(LlamaGenConfig.model_type, LlamaGenConfig)
