"""Image tokenizers: how pixels become codes."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlmm.config.base import Strict

MAX_LEVELS = 1000
"""The bound of FSQ is a thousandth wider than the outermost level, which past this rounds to a level too many."""


class CodecNetwork(Strict):
    """The convolutional encoder and decoder around a quantizer: one token a patch."""

    image_size: tuple[int, int]
    """(height, width) in pixels, multiples of `patch`."""
    channels: Literal[1, 3] = 3
    """1: grey, 3: RGB."""
    patch: tuple[int, int] = (8, 8)
    """(height, width) in pixels of what one token stands for; one number makes it square."""
    width: int = Field(64, ge=8)
    """Channels of the hidden layers, a multiple of 8."""
    blocks: int = Field(2, ge=0)
    """Residual blocks on each side of the quantizer."""
    context: Literal["both", "decoder", "none"] = "both"
    """Which side sees the neighbours of a patch. decoder: a patch's code depends on that patch alone, so what repeats
    on the token grid (letters in cells) has one code wherever it stands, which a policy learns in far fewer steps.
    none: the decoder sees one patch alone too, for images made of cells that know nothing of each other. both:
    neighbours share the work, for content that lies anywhere."""
    edge_weight: float = Field(0.0, ge=0)
    """Weight of the multi-scale edge loss, which keeps strokes and outlines sharp; 0 leaves it out."""

    @field_validator("patch", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _whole_patches(self) -> "CodecNetwork":
        (height, width), (rows, columns) = self.image_size, self.patch
        if min(rows, columns) < 1 or height % rows or width % columns or min(height, width) < 1:
            raise ValueError(
                f"image_size {height}x{width} is not made of whole {rows}x{columns}-pixel patches; change either"
            )
        if self.width % 8:
            raise ValueError(f"width {self.width} is not a multiple of 8, the size of a normalisation group")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.image_size[0] // self.patch[0], self.image_size[1] // self.patch[1]

    @property
    def tokens(self) -> int:
        """Codes of an image."""
        return math.prod(self.grid)


class FsqCodec(CodecNetwork):
    """Finite scalar quantization (Mentzer et al. 2023): a grid of levels, nothing to learn and nothing to die."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = (8, 6, 5)
    """Levels of each latent channel; their product is the number of codes."""

    @model_validator(mode="after")
    def _few_and_at_least_two(self) -> "FsqCodec":
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels {list(self.levels)}: give at least one channel, each with 2 levels or more")
        if max(self.levels) > MAX_LEVELS:
            raise ValueError(
                f"levels {list(self.levels)}: a channel has at most {MAX_LEVELS} levels; spread them over more channels"
            )
        return self

    @property
    def num_codes(self) -> int:
        return math.prod(self.levels)


class VqCodec(CodecNetwork):
    """Vector quantization (van den Oord et al. 2017) with a learned codebook."""

    kind: Literal["vq"] = "vq"
    codebook_size: int = Field(512, ge=2)
    code_dim: int = Field(8, ge=1)
    commitment: float = Field(0.25, ge=0)
    """Weight beta of the commitment loss (eq. 3)."""

    @property
    def num_codes(self) -> int:
        return self.codebook_size


class LfqCodec(CodecNetwork):
    """Lookup-free quantization (Yu et al. 2023, MAGVIT-v2): the signs of the latent channels are the code."""

    kind: Literal["lfq"] = "lfq"
    bits: int = Field(10, ge=1, le=18)
    entropy_weight: float = Field(0.1, ge=0)
    commitment: float = Field(0.25, ge=0)

    @property
    def num_codes(self) -> int:
        return 2**self.bits


class Perceptual(Strict):
    """A perceptual loss beside the codec's own: the distance of a frozen vision network's features."""

    model: str
    """A folder or hub id of any transformers vision model that gives `hidden_states`: ResNet, ConvNeXt, CLIP."""
    weight: float = Field(1.0, gt=0)
    layers: tuple[int, ...] | None = Field(None, min_length=1)
    """Indices into `hidden_states`; all by default. The first ones see strokes and texture, the last ones content."""


class PretrainedCodec(Strict):
    """The image tokenizer of a published checkpoint: no recipe names one, a checkpoint brings it along."""

    kind: Literal["pretrained"] = "pretrained"
    network: str
    """The name of its class among `rlmm.codecs.networks`, e.g. emu3."""
    config: dict[str, Any]
    """What the class is built from."""
    grid: tuple[int, int]
    """Rows and columns of tokens."""
    image_size: tuple[int, int]
    """(height, width) in pixels."""
    num_codes: int = Field(..., ge=2)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Pixels in [0, 1] are shifted by `mean` and divided by `std` before the network sees them."""
    channels: Literal[3] = 3
    preview: tuple[int, int] | None = None
    """Rows and columns of codes of the image in small, which come before the others."""

    @property
    def tokens(self) -> int:
        return math.prod(self.grid) + math.prod(self.preview or (0,))


CodecConfig = Annotated[FsqCodec | VqCodec | LfqCodec, Field(discriminator="kind")]
StoredCodec = Annotated[FsqCodec | VqCodec | LfqCodec | PretrainedCodec, Field(discriminator="kind")]
"""What a codec folder may hold."""
