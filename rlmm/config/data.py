"""Where prompts and target images come from: generated words, generated scenes, or a user's own rows."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlmm.config.base import Strict

Split = Literal["train", "prompts", "fresh", "held_out"]
"""train: prompts with target images, for codec and SFT. prompts: what RL samples from. fresh: the same with target
images, where those can be made. held_out: never trained on."""

MAX_EXCLUDED_SHARE = 0.05
"""More excluded rows than this share are an error, where the config does not say another one."""

Task = Literal["count", "pair", "relation"]
Color = Literal["red", "green", "blue", "yellow", "purple"]
Shape = Literal["circle", "square", "triangle"]


class WordsData(Strict):
    """Generated text rendering, 96x32 grey: one fixed-pitch letter a 16-pixel cell (`rlmm.data.words`)."""

    kind: Literal["words"] = "words"
    train_images: int = Field(1500, ge=1)
    """Word-font pairs that have a target image: a fixed set, which does not grow with the number of steps."""
    held_out_words: int = Field(512, ge=1)
    """Words kept out of `train` and `prompts`. Which ones does not depend on the run's seed."""
    min_letters: int = Field(3, ge=1, le=6)
    max_letters: int = Field(6, ge=1, le=6)
    font_in_prompt: bool = False
    """Ask for the font: `render "HELLO" in bold`. Without it the font is the model's choice."""

    @model_validator(mode="after")
    def _some_lengths(self) -> "WordsData":
        if self.min_letters > self.max_letters:
            raise ValueError(f"min_letters {self.min_letters} is above max_letters {self.max_letters}")
        return self


class ScenesData(Strict):
    """Generated scenes of counted, coloured shapes, 48x48 RGB (`rlmm.data.scenes`); `rewards.scenes` verifies
    them."""

    kind: Literal["scenes"] = "scenes"
    variant: Literal["text_to_image", "edit", "describe"] = "text_to_image"
    """edit: a source image and an instruction (recolor, reshape, remove, add). describe: a source image and a question,
    to be answered by the text that asks for such a scene (counts and pairs, of which either order is right)."""
    train_images: int = Field(4000, ge=1)
    """Scenes with a picture: a fixed set, which does not grow with the number of steps."""
    prompts: int | None = Field(None, ge=1)
    """Requests without pictures that RL samples from; as many as `train_images` if null."""
    held_out: int = Field(256, ge=1)
    """Most held-out prompts; every one is a combination that `train` and `prompts` never show."""
    held_out_share: float = Field(0.1, gt=0, lt=1)
    """Share of all combinations that is held out. Which ones does not depend on the run's seed."""
    tasks: tuple[Task, ...] = ("count", "pair", "relation")
    """Kinds of text_to_image prompt, in equal shares of `train`."""
    max_count: int = Field(3, ge=1, le=4)
    """Most objects of one shape and colour."""
    colors: tuple[Color, ...] = ("red", "green", "blue", "yellow", "purple")
    shapes: tuple[Shape, ...] = ("circle", "square", "triangle")
    placement: Literal["free", "fixed"] = "free"
    """fixed: one picture a prompt, objects in reading order; easier to learn, for any placement scores the
    same."""

    @model_validator(mode="after")
    def _enough_to_combine(self) -> "ScenesData":
        for name, values in (("tasks", self.tasks), ("colors", self.colors), ("shapes", self.shapes)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must list at least one value, each once; given: {list(values)}")
        if len(self.colors) * len(self.shapes) < 3:
            raise ValueError(f"{len(self.colors)} colors x {len(self.shapes)} shapes are too few; three are the least")
        return self


class RowsData(Strict):
    """A user's own rows, read with the `datasets` library (`rlmm.data.rows`)."""

    kind: Literal["rows"] = "rows"
    path: str
    """A file, a glob of files, a folder of images, or with `format: hub` a dataset id on the Hugging Face
    hub."""
    format: Literal["auto", "parquet", "json", "csv", "text", "images", "hub"] = "auto"
    """auto goes by the file's extension. json: JSON lines, or a list. text: a prompt a line, column
    `text`."""
    split: str = "train"
    """The split to read; only hub datasets have several."""
    subset: str | None = None
    revision: str | None = None
    held_out_path: str | None = None
    """Held-out rows from a path of their own (same format), less those whose prompt is also in the training rows."""
    held_out_split: str | None = None
    """Held-out rows from another split of the same hub dataset, less those whose prompt is also in the training
    rows."""
    held_out_share: float = Field(0.05, ge=0, lt=1)
    """Without a held-out path or split: the share of prompts kept out, by a hash of the prompt, so that all
    rows of a prompt fall on the same side, in every run."""
    prompt_column: str = "prompt"
    """Text, or chat messages (a list of {role, content}) with images in them."""
    target_column: str | None = None
    """The image to learn from; only codec and SFT stages need it. Without it, the image of a final assistant
    message is the target."""
    sources_column: str | None = None
    """The image, or list of images, that the prompt is about; [] for none. With messages they fill the image
    parts that hold no image themselves."""
    text_column: str | None = None
    """What the policy should write: an answer, or the thought before the target image. Text, or a list of texts of
    which the first is taught and each is right for a reward. With messages, the text of a final assistant message."""
    codes_column: str | None = None
    """Codes of the target image, already made by the policy's codec: a list of integers, row by row of its grid."""
    token_cache: str | None = None
    """A folder where codes of images are kept for every run that names it; the run's own `tokens/` if null."""
    image_root: str | None = None
    """The folder image paths are relative to; by default the folder of the (first) file. Paths in hub rows
    are refused unless it is set."""
    image_size: tuple[int, int] | None = None
    """(width, height) every image is brought to; the codec's size. Null leaves images as they are."""
    image_mode: Literal["RGB", "L"] = "RGB"
    resize: Literal["crop", "pad", "stretch"] = "crop"
    """How an image of another shape fits `image_size`: cut the longer side, pad with white, or distort."""
    streaming: bool = False
    """Read the first `limit` rows without downloading or converting the rest."""
    limit: int | None = Field(None, ge=1)
    """Use only the first rows."""
    max_prompt_characters: int | None = Field(None, ge=1)
    """Rows with a longer prompt are excluded."""
    max_excluded_share: float = Field(MAX_EXCLUDED_SHARE, ge=0, le=1)
    """Excluded rows (empty prompt, unreadable image, a prompt that the policy cannot take, ...) above this share of
    the rows read are an error."""
    check_images: Literal["decode", "header"] = "decode"
    """decode reads every image once at the start. header only opens it: quick on large sets, but one that is
    cut short then stops the run when it is first needed."""
    cache_dir: str | None = None
    """Where `datasets` keeps its converted copy; its own default if null."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> "RowsData":
        if self.streaming and self.limit is None:
            raise ValueError("streaming needs `limit`, the number of rows to read from the stream")
        if self.held_out_path and self.held_out_split:
            raise ValueError("held_out_path and held_out_split exclude each other; keep one")
        if self.format != "hub":
            # By value: a resolved config, which is read back, names every field.
            hub_only = ("split", "held_out_split", "subset", "revision")
            given = {name for name in hub_only if getattr(self, name) != type(self).model_fields[name].default}
            if given:
                raise ValueError(f"{', '.join(sorted(given))}: only for datasets of the hub, `format: hub`")
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"image_size is (width, height) in pixels, both at least 1: {self.image_size}")
        return self


Data = Annotated[WordsData | ScenesData | RowsData, Field(discriminator="kind")]
