"""What a checkpoint draws or writes for some prompts: what `rlmm sample` shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rlmm.codecs import Codec
from rlmm.config.engines import TorchEngineConfig
from rlmm.config.masked import UnmaskingConfig
from rlmm.config.policy import CheckpointPolicy
from rlmm.config.sampling import Sampling
from rlmm.data import Example
from rlmm.data.base import UnusableRow
from rlmm.data.images import ImageReader, fit
from rlmm.policies.families.loading import checkpoint_codec, load_policy
from rlmm.policies.responses import Response, response_of, texts_of
from rlmm.policies.transformer import TransformerPolicy
from rlmm.seeds import derive
from rlmm.train import experience as phases
from rlmm.train.drawing import decode_images
from rlmm.train.engines import build_engine
from rlmm.train.processes import device
from rlmm.train.tokens import ImageTokens
from rollouts.contract import Engine, Layout

GAP = 4


@dataclass(frozen=True)
class Samples:
    """Prompt after prompt, `columns` of each: images (none where texts alone were asked for) and texts (empty where
    none were)."""

    images: list[Image.Image]
    texts: list[str]
    columns: int

    def grid(self) -> Image.Image:
        """The images on a light sheet, a row a prompt. ValueError where there are none."""
        if not self.images:
            raise ValueError("answers were asked for, and no image was drawn; read `texts`")
        width, height = self.images[0].size
        rows = -(-len(self.images) // self.columns)
        size = self.columns * (width + GAP) + GAP, rows * (height + GAP) + GAP
        sheet = Image.new("RGB", size, (226, 226, 226))
        for i, image in enumerate(self.images):
            place = (GAP + i % self.columns * (width + GAP), GAP + i // self.columns * (height + GAP))
            sheet.paste(image.convert("RGB"), place)
        return sheet


@dataclass(frozen=True)
class Drawer:
    """A checkpoint that is ready to draw under one law."""

    policy: TransformerPolicy
    codec: Codec
    response: Response
    engine: Engine

    @staticmethod
    def of(source: CheckpointPolicy, sampling: Sampling) -> "Drawer":
        """A masked policy without an unmasking reveals in a quarter as many steps as there are positions. Raises
        ValueError on a source that is no checkpoint.
        """
        policy, codec = load_policy(source.path, source), checkpoint_codec(source).to(device())
        policy.model.eval()
        policy.to(device())
        codec.eval()
        response = response_of(policy, _unmasked(sampling, policy.layout))
        return Drawer(policy, codec, response, build_engine(TorchEngineConfig(), policy))

    def draw(
        self,
        prompts: Sequence[str],
        samples: int,
        *,
        seed: int = 0,
        sources: Sequence[Image.Image] = (),
        first: int = 0,
    ) -> Samples:
        """The same seed draws the same. `sources`: images that every prompt is about; `first`: the number of the first
        prompt, where they come in parts. Raises ValueError on an empty prompt.
        """
        empty = [i for i, prompt in enumerate(prompts) if not prompt.strip()]
        if empty or not prompts:
            raise ValueError(f"prompt {empty[0] + 1 if empty else 1} is empty; give each prompt some text")
        tokens, shown = (
            ImageTokens(self.codec, pictures=self.policy.pictures),
            tuple(_fitted(image, self.codec) for image in sources),
        )
        requests = [
            phases.request_for(
                self.response,
                tokens,
                Example(prompt, sources=shown),
                str(p),
                [derive(seed, "sample", p, s) for s in range(samples)],
            )
            for p, prompt in enumerate(prompts, first)
        ]
        made = phases.generate(self.engine, self.response, requests, self.policy.model)
        images = decode_images(self.codec, self.policy, made)
        return Samples(images, texts_of(self.policy.tokenizer, made), samples)


def draw_samples(
    source: CheckpointPolicy,
    prompts: Sequence[str],
    samples: int,
    sampling: Sampling,
    *,
    seed: int = 0,
    sources: Sequence[Image.Image] = (),
) -> Samples:
    """All prompts at once by `Drawer`."""
    return Drawer.of(source, sampling).draw(prompts, samples, seed=seed, sources=sources)


def read_image(path: Path) -> Image.Image:
    """A picture in a file, upright. ValueError where there is none that can be read."""
    try:
        return ImageReader(root=None).read(path.read_bytes())
    except (OSError, UnusableRow) as error:
        raise ValueError(f"{path} is no readable picture: {error}") from error


def _fitted(image: Image.Image, codec: Codec) -> Image.Image:
    """Of the codec's size, the longer side cut."""
    height, width = codec.image_size
    return fit(image.convert("RGB" if codec.channels == 3 else "L"), (width, height), "crop")


def _unmasked(sampling: Sampling, layout: Layout) -> Sampling:
    """With an unmasking where the policy needs one."""
    if layout.mask is None:
        if sampling.unmasking is not None:
            raise ValueError("unmasking is of masked policies, and this one decides one token after the other")
        return sampling
    if sampling.unmasking is not None:
        return sampling
    steps = max(1, len(layout.grid.decided()) // 4)
    return sampling.model_copy(
        update={"unmasking": UnmaskingConfig.model_validate({"steps": steps, "order": "random"})}
    )
