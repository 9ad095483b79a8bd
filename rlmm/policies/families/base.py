"""What a checkpoint family states, and what it is handed: one record each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from rlmm.codecs import Codec
from rlmm.codecs.network_files import published_file, safetensors_of, unreadable
from rlmm.config.base import nearest
from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.models import Showo, ShowoConfig
from rlmm.policies.spelling import Spelling
from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Layout

KNOWN_AS = {
    name: ("qwen3", "Qwen3ForCausalLM")
    for name in ("blip3o_qwen", "blip3o_qwen_inference", "blip3o_qwen_grpo", "llava_qwen_grpo")
}
"""Model types that transformers lacks, of language models that it has with other parts beside: its type and class."""
SETTINGS = frozenset({"image_size", "template", "null_prompt", "decoder", "image_tokenizer"})
"""Of a recipe's policy, those that only some families have a use for."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint before its weights are read. `source`: a folder or a hub id."""

    source: str
    options: CheckpointPolicy

    @cached_property
    def config(self) -> PretrainedConfig:
        """Raises ValueError where there is none."""
        try:
            stated, _ = PretrainedConfig.get_config_dict(self.source)
            if stated.get("_class_name") == Showo.__name__:  # no format of transformers'
                return ShowoConfig.published(self.source, stated)
            if stated.get("model_type") in KNOWN_AS:
                kind, name = KNOWN_AS[stated["model_type"]]
                return CONFIG_MAPPING[kind].from_dict(stated | {"model_type": kind, "architectures": [name]})
            return AutoConfig.from_pretrained(self.source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise unreadable(self.source, error) from error

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Show-o comes without one: its language model's, with what Show-o adds to it."""
        added_to = self.config if isinstance(self.config, ShowoConfig) else None
        if added_to is not None and published_file(self.source, TOKENIZER_CONFIG_FILE) is not None:
            added_to = None
        source = self.source if added_to is None else added_to.llm_model_path
        try:
            made = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, trust_remote_code=False))
        except (OSError, ValueError) as error:
            raise unreadable(source, error) from error
        if added_to is not None:
            added_to.complete(made)
        return made

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    def token(self, name: str) -> int:
        """The id of a special token. ValueError where the tokenizer lacks it."""
        if name not in self.vocabulary:
            close = nearest(name, [token for token in self.vocabulary if token[:1] == name[:1]][:1000])
            raise ValueError(f"the tokenizer of {self.source} has no token {name!r}.{close}")
        return self.vocabulary[name]

    def spelled(self, layout: Layout, text: str) -> tuple[int, ...]:
        """A prompt's ids under a layout's template."""
        return tuple(Spelling(self.tokenizer, layout, 1 << 30).encode(text))

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of plain text."""
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def weights(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """The weights below a part of the model, e.g. `vqmodel.`, one at a time, under their names inside of it.

        Raises ValueError where the checkpoint has no safetensors files.
        """
        for name, tensor in safetensors_of(self.source, part):
            yield name.split(part, 1)[1], tensor

    def size(self, own: tuple[int, int], step: int) -> tuple[int, int]:
        """(height, width) of the images to draw; ValueError where it is not made of `step`-pixel patches."""
        height, width = self.options.image_size or own
        if height % step or width % step:
            raise ValueError(
                f"policy.image_size {height}x{width}: one token of {self.source} stands for {step}x{step} pixels; give "
                "multiples of that"
            )
        return height, width


@dataclass(frozen=True)
class Family:
    """How the checkpoints of a family are read.

    Attributes:
        architectures: classes of transformers or of `rlmm.policies.models`, as config.json names them.
        policy: how its sequences are embedded and decided.
        layout: where text and image live in the vocabulary, from a published checkpoint.
        codec: the image tokenizer inside a published checkpoint.
        settings: what of `SETTINGS` a recipe may say of such a checkpoint.
        masked: whether an image is revealed (masked diffusion), and not written from left to right.
        tiny: writes a random instance of the real class with the published vocabulary, special tokens and grid rules,
            and a few thousand weights beside them: what tests and `model=tiny` run.
        named: read so only where a recipe names the family: its classes are those of plain language models too.
        reads_hidden: whether the codec draws from the policy's hidden states (`Codec.reads_hidden`).
        known_as: names in published config.json files -> the class of `architectures` that they stand for.
        mend: fills in weights of the model, of these names, whose shapes in the checkpoint are others. None: that there
            are some is an error.
    """

    name: str
    architectures: tuple[str, ...]
    policy: Callable[[PreTrainedModel, PreTrainedTokenizerBase, Layout], TransformerPolicy]
    layout: Callable[[Checkpoint], Layout]
    codec: Callable[[Checkpoint], Codec]
    tiny: Callable[[Path, tuple[int, int]], None] | None = None
    settings: frozenset[str] = frozenset({"image_size", "template"})
    masked: bool = False
    named: bool = False
    reads_hidden: bool = False
    known_as: Mapping[str, str] = field(default_factory=dict)
    mend: Callable[[PreTrainedModel, Checkpoint, Sequence[str]], None] | None = None
