"""What samples are drawn with: images, and text before an image or instead of one."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlmm.config.base import Strict
from rlmm.config.masked import UnmaskingConfig
from rollouts.contract import Layout
from rollouts.law import Law
from rollouts.trajectory import Span


class Writing(Strict):
    """How text that the policy writes is asked for, and what ends it."""

    template: str | None = None
    """How the prompt is written, with {prompt} in it; as before an image if null."""
    stop: tuple[str, ...] = ()
    """Tokens that end the text, by name; the family's own or the tokenizer's end of sequence where none is named."""

    @field_validator("template")
    @classmethod
    def _takes_a_prompt(cls, template: str | None) -> str | None:
        if template is not None and template.count("{prompt}") != 1:
            raise ValueError(f"template {template!r} must hold {{prompt}} once: it is where the prompt's text goes")
        return template


class Written(Writing):
    """Text that the policy writes. Its law has no guidance: the unconditional stream is the image's alone."""

    length_limit: int = Field(..., ge=1)
    """Tokens; what has not ended by then is cut."""
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    advantage_weight: float = Field(1.0, ge=0)
    """Of its tokens in the loss; denominators stay as they are. 0 leaves the text untrained."""

    def span(self, layout: Layout, stop: tuple[int, ...]) -> Span:
        """The span, ended by the token ids `stop`."""
        law = Law(layout.text, temperature=self.temperature, mode="none", top_k=self.top_k, top_p=self.top_p)
        return Span("text", law, self.length_limit, self.advantage_weight, stop=stop)


class Sampled(Strict):
    """What samples are drawn with, the temperature apart."""

    guidance_scale: float = 1.0
    source_scale: float | None = None
    """Editing: a scale of its own for the source image (Brooks et al. 2023)."""
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    unmasking: UnmaskingConfig | None = None
    """How images are revealed: a masked policy needs it, a next-token one has no use for it."""
    advantage_weight: float = Field(1.0, ge=0)
    """Of the image's tokens in the loss, beside those of a thought."""
    thought: Written | None = None
    """Text that the policy writes before it draws. It is shown to the conditional stream alone."""
    answer: Written | None = None
    """Text instead of an image: a question about source images, or a text task."""

    @property
    def written(self) -> Written | None:
        return self.thought or self.answer

    @model_validator(mode="after")
    def _text_has_its_own_settings(self) -> "Sampled":
        if self.thought is not None and self.answer is not None:
            raise ValueError("thought comes before an image and answer instead of one; give one of them")
        if self.answer is not None:
            ours = {"guidance_scale": 1.0, "source_scale": None, "top_k": 0, "top_p": 1.0, "unmasking": None}
            given = [name for name, value in {**ours, "advantage_weight": 1.0}.items() if getattr(self, name) != value]
            if given:
                raise ValueError(f"{given[0]} is of images, and with answer none is drawn; leave it out")
        return self


class Sampling(Sampled):
    """The law rollouts are sampled from and the loss differentiates."""

    temperature: float = Field(1.0, gt=0)
    guidance: Literal["none", "guided", "conditional_only", "rescaled"] = "guided"

    @model_validator(mode="after")
    def _is_a_law(self) -> "Sampling":
        self.law((0, 1 << 31))
        return self

    def law(self, vocabulary: tuple[int, int]) -> Law:
        """The image's law over a vocabulary slice; ValueError where the settings exclude each other."""
        return Law(
            vocabulary=vocabulary,
            temperature=self.temperature,
            guidance_scale=self.guidance_scale,
            source_scale=self.source_scale,
            mode=self.guidance,
            top_k=self.top_k,
            top_p=self.top_p,
        )

    def span(self, layout: Layout) -> Span:
        """One image of the layout's grid, under the law and the unmasking."""
        unmasking = None if self.unmasking is None else self.unmasking.record()
        return Span("image", self.law(layout.image), layout.grid.length, self.advantage_weight, unmasking)
