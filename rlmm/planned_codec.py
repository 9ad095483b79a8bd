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
from rlmm.planned_data import Read
from rlmm.policies.families.loading import checkpoint_codec, own_folder
from rlmm.train.tokens import BATCH

FLOAT_BYTES, CODE_BYTES = 4, 8
CHUNKS = 3
"""Parts of a rollout that are drawn for a plan; each one after them adds its finished pictures alone."""
UNDRAWN = "what draws pictures, a model that is read with the first one, is not counted"


@dataclass(frozen=True)
class CodecPlan:
    """Bytes of an image tokenizer's weights, and what makes one without any memory, where it can be run so.
    `uncounted`: why something of it is not in the plan; `undrawn`: that of stages which draw."""

    weights: int = 0
    make: Callable[[], Codec] | None = None
    uncounted: str = ""
    undrawn: str = ""

    def working(self, stage: PolicyStage, processes: int, data: Read) -> int:
        """The most bytes that a stage holds while it makes codes of pictures, or pictures of codes. `data`: what it
        learns from."""
        if self.make is None:
            return 0
        if not isinstance(stage, GrpoStage):
            count = max(_encoded(stage, data), data.most_sources)
            return encoding(self.make, count) if count else 0
        if stage.sampling.answer is not None or self.undrawn:
            return 0
        prompts = stage.prompts_per_step // processes
        return decoding(self.make, min(prompts, stage.score_chunk or prompts) * stage.samples_per_prompt)

    def notes(self, stage: PolicyStage) -> tuple[str, ...]:
        """What is said of a stage."""
        draws = isinstance(stage, GrpoStage) and stage.sampling.answer is None
        return tuple(filter(None, (self.uncounted, self.undrawn if draws else "")))


def _encoded(stage: PolicyStage, data: Read) -> int:
    """Pictures, of rows that are read together."""
    if isinstance(stage, DpoStage) and stage.pairs is not None:
        return 0  # their codes are stored with them
    most = BATCH * (2 if isinstance(stage, DpoStage) else 1)
    return most if data.encoded is None else min(most, data.encoded)


def codec_plan(recipe: Recipe) -> CodecPlan:
    """Of the recipe's image tokenizer. Of a published one the weights are read, for their shapes."""
    try:
        make = _outline(recipe)
    except (ValueError, OSError, ImportError) as error:  # at which a run stops
        return CodecPlan(uncounted=f"the image tokenizer is not counted: {error}")
    with torch.device("meta"):
        codec = make()
    weights = sum(one.numel() * one.element_size() for one in (*codec.parameters(), *codec.buffers()))
    undrawn = UNDRAWN if codec.loads_decoder else ""
    try:
        encoding(make, 1)
        if not undrawn:
            decoding(make, 1)
    except NO_DRY_RUN as error:
        return CodecPlan(weights, None, f"making codes and pictures is not counted ({error})", undrawn)
    except ValueError as error:  # of a checkpoint that lacks its encoder
        return CodecPlan(weights, None, f"making codes of pictures is not counted: {error}", undrawn)
    return CodecPlan(weights, make, "", undrawn)


def decoding(make: Callable[[], Codec], images: int) -> int:
    """The most bytes held while codes of so many images become pictures, both among them."""
    with _bare(make) as codec, Live() as live:
        few = min(images, CHUNKS * codec.at_once)
        codec.draw(torch.zeros(few, codec.tokens, dtype=torch.long))
    height, width = codec.image_size
    picture, codes = codec.channels * height * width * FLOAT_BYTES, codec.tokens * CODE_BYTES
    # At the end finished parts stand beside what they are joined to.
    return max(live.peak + (images - few) * (picture + codes), images * (2 * picture + codes))


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
