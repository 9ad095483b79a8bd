"""What the image tokenizer holds beside a policy, by running it on tensors that have shapes and no memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlmm.codecs import Codec, empty_codec, load_settings
from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe
from rlmm.config.stages import DpoStage, GrpoStage, PolicyStage
from rlmm.dry_run import NO_DRY_RUN, Live, onto_cpu
from rlmm.policies.families.loading import checkpoint_codec, own_folder
from rlmm.train.tokens import BATCH


@dataclass(frozen=True)
class CodecPlan:
    """Bytes of an image tokenizer's weights, and what makes one without any memory, where it can be run so.
    `uncounted`: why something of it is not in the plan."""

    weights: int = 0
    make: Callable[[], Codec] | None = None
    uncounted: str = ""

    def working(self, stage: PolicyStage, processes: int) -> int:
        """The most bytes that a stage holds while it makes codes of pictures, or pictures of codes."""
        made_before = isinstance(stage, DpoStage) and stage.pairs is not None
        if self.make is None or made_before:
            return 0
        if not isinstance(stage, GrpoStage):
            return encoding(self.make, BATCH)
        if stage.sampling.answer is not None:
            return 0
        prompts = stage.prompts_per_step // processes
        return decoding(self.make, min(prompts, stage.score_chunk or prompts) * stage.samples_per_prompt)


def codec_plan(recipe: Recipe) -> CodecPlan:
    """Of the recipe's image tokenizer. Of a published one the weights are read, for their shapes."""
    try:
        make = _outline(recipe)
    except ValueError as error:  # at which a run stops
        return CodecPlan(uncounted=f"the image tokenizer is not counted: {error}")
    with torch.device("meta"):
        codec = make()
    weights = sum(one.numel() * one.element_size() for one in (*codec.parameters(), *codec.buffers()))
    if codec.reads_hidden:
        return CodecPlan(weights, uncounted="what draws pictures of hidden states is not counted")
    try:
        decoding(make, 1)
        encoding(make, 1)
    except NO_DRY_RUN as error:
        return CodecPlan(weights, uncounted=f"making codes and pictures is not counted ({error})")
    return CodecPlan(weights, make)


def decoding(make: Callable[[], Codec], images: int) -> int:
    """The most bytes held while codes of so many images become pictures, both among them."""
    with _bare(make) as codec, Live() as live:
        codec.draw(torch.zeros(images, codec.tokens, dtype=torch.long))
    return live.peak


def encoding(make: Callable[[], Codec], images: int) -> int:
    """The most bytes held while so many images become codes, those that wait among them where all is in one memory."""
    with _bare(make) as codec, Live() as live:
        waiting = min(images, codec.at_once) if torch.cuda.is_available() else images
        pictures_BCHW = torch.zeros(waiting, codec.channels, *codec.image_size)
        codec.codes(pictures_BCHW[: codec.at_once])
    return live.peak


@contextmanager
def _bare(make: Callable[[], Codec]) -> Iterator[Codec]:
    with torch.device("meta"):
        codec = make()
    with torch.no_grad(), FakeTensorMode():
        onto_cpu(codec)
        yield codec


def _outline(recipe: Recipe) -> Callable[[], Codec]:
    """Builds the recipe's image tokenizer, its weights not read."""
    policy = recipe.policy
    if not isinstance(policy, CheckpointPolicy):
        assert recipe.codec is not None, "the recipe lets no new policy be without"
        return partial(empty_codec, recipe.codec)
    if own_folder(policy.path) and not policy.tiny:
        return partial(empty_codec, load_settings(Path(policy.path) / "codec"))
    return partial(empty_codec, checkpoint_codec(policy).settings)
