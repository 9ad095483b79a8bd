"""What a checkpoint family states, and what it is handed: one record each."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from rlmm.codecs import Codec
from rlmm.config.base import nearest
from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.models import Showo, ShowoConfig
from rlmm.policies.spelling import Spelling
from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Layout

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
            return AutoConfig.from_pretrained(self.source)
        except (OSError, ValueError) as error:
            raise _unreadable(self.source, error) from error

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Show-o comes without one: its language model's, with what Show-o adds to it."""
        added_to = self.config if isinstance(self.config, ShowoConfig) else None
        if added_to is not None and _found(self.source, TOKENIZER_CONFIG_FILE) is not None:
            added_to = None
        source = self.source if added_to is None else added_to.llm_model_path
        try:
            made = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source))
        except (OSError, ValueError) as error:
            raise _unreadable(source, error) from error
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
        for name, tensor in _safetensors(self.source, part):
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
    """

    name: str
    architectures: tuple[str, ...]
    policy: Callable[[PreTrainedModel, PreTrainedTokenizerBase, Layout], TransformerPolicy]
    layout: Callable[[Checkpoint], Layout]
    codec: Callable[[Checkpoint], Codec]
    tiny: Callable[[Path, tuple[int, int]], None] | None = None
    settings: frozenset[str] = frozenset({"image_size", "template"})
    masked: bool = False


def _safetensors(source: str, part: str) -> Iterator[tuple[str, Tensor]]:
    files = _files(source, part)
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    if part in name:
                        yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(source, error) from error


def _files(source: str, part: str) -> list[str]:
    """The files that hold the part."""
    index = _found(source, SAFE_WEIGHTS_INDEX_NAME)
    if index is not None:
        places: dict[str, Any] = json.loads(Path(index).read_text())["weight_map"]
        names = sorted({file for name, file in places.items() if part in name})
        return [file for name in names if (file := _found(source, name)) is not None]
    whole = _found(source, SAFE_WEIGHTS_NAME)
    if whole is None:
        raise ValueError(f"{source} has no {SAFE_WEIGHTS_NAME}; convert its weights to safetensors first")
    return [whole]


def _found(source: str, name: str) -> str | None:
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def _unreadable(source: str, error: Exception) -> ValueError:
    return ValueError(
        f"{source} is not a readable checkpoint ({error}); give a complete folder, a stage's with its layout.json or a "
        "published one, or a hub id"
    )
