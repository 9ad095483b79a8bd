"""What is trained: a new small transformer, or a checkpoint folder."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlmm.config.base import Strict


class Lora(Strict):
    """LoRA (Hu et al. 2021, arXiv 2106.09685). Without it a stage trains all weights."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    target_modules: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class NewPolicy(Strict):
    """A Llama-style transformer from scratch, text and image codes in one vocabulary; its grid is the codec's."""

    kind: Literal["new"] = "new"
    family: Literal["next_token", "masked"] = "next_token"
    """masked: every position sees every other, and an image is revealed a few positions a step (masked diffusion)."""
    prompt_attention: Literal["full", "causal"] = "full"
    """Of a masked policy. full: a prompt's positions see the image, too. causal: only what stands before them, so that
    the sampler reads a prompt once for all steps and samples."""
    hidden_size: int = Field(128, ge=8)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    intermediate_size: int = Field(384, ge=8)
    max_positions: int = Field(256, ge=8)
    tie_embeddings: bool = False
    words: tuple[Annotated[str, Field(pattern=r"^[A-Za-z]+$")], ...] = ()
    """Words of the prompts that are one token each; all else is spelled in characters. Where prompts are made of a few
    dozen words, a policy learns in far fewer steps what each of them means."""
    null: Literal["prompt", "token"] = "prompt"
    """The unconditional stream's prompt, under guidance: one <null> token, or as many as the prompt has. With `token`
    vLLM draws a guided sample in one request."""
    row_ends: bool = False
    """Force an end-of-row token after each row of the grid, as Emu3-style layouts do."""

    @field_validator("words")
    @classmethod
    def _each_once(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({word for word in words if words.count(word) > 1}):
            raise ValueError(f"words lists {twice[0]!r} twice; each word is one token")
        return words

    @model_validator(mode="after")
    def _whole_heads(self) -> "NewPolicy":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; change one"
            )
        return self

    @model_validator(mode="after")
    def _only_next_token_rows_end(self) -> "NewPolicy":
        if self.family == "masked" and self.null == "token":
            raise ValueError(
                "null: token lets vLLM draw both streams of a next-token policy in one request; a masked policy is "
                "not sampled by vLLM: leave it out"
            )
        if self.family == "next_token" and self.prompt_attention != "full":
            raise ValueError("prompt_attention is of masked policies; a next-token one is causal anyway: leave it out")
        return self


class CheckpointPolicy(Strict):
    """A published checkpoint of a known family, or a folder written by `rlmm export` or by a stage, which knows its own
    layout: there only `path` is set."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: str
    """A folder, or a hub id."""
    family: str | None = None
    """A name of `rlmm.policies.families`, or `file.py:NAME` of a family of yours; by the checkpoint's class if null."""
    image_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """(height, width) in pixels of the images to draw, where the family has a choice; its own size if null."""
    template: str | None = None
    """How a prompt is written, with {prompt} in it; the family's own if null."""
    null_prompt: str | None = None
    """The prompt of the unconditional stream (a negative prompt), for families that take one; their own if null."""
    decoder: str | None = None
    """A file or folder with the weights of the image decoder, for checkpoints that lack it (Chameleon, SimpleAR), or
    the release of the diffusion model that draws (GLM-Image, BLIP3o-NEXT)."""
    image_tokenizer: str | None = None
    """A folder or hub id of the image tokenizer, for checkpoints that come without one (MMaDA, Show-o); the published
    one if null."""
    tiny: bool = False
    """In place of the checkpoint a random instance of its family's class: a trial of the recipe (`model=tiny`)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What the weights are held in; null: float32 for a published checkpoint, as it was saved for a folder of ours.
    bfloat16 halves their memory, for LoRA; all weights are trained in float32."""

    @model_validator(mode="after")
    def _tiny_of_a_family(self) -> "CheckpointPolicy":
        if self.tiny and self.family is None:
            raise ValueError("tiny needs policy.family: the checkpoint, which would tell it, is not read; name it")
        return self

    @field_validator("template")
    @classmethod
    def _takes_a_prompt(cls, template: str | None) -> str | None:
        if template is not None and template.count("{prompt}") != 1:
            raise ValueError(f"template {template!r} must hold {{prompt}} once: it is where the prompt's text goes")
        return template


Policy = Annotated[NewPolicy | CheckpointPolicy, Field(discriminator="kind")]
