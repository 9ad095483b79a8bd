"""What a recipe says of learning from preferences, and of rows that hold some."""

from typing import Literal

from pydantic import Field, model_validator

from rlmm.config.base import Strict
from rlmm.config.data import MAX_EXCLUDED_SHARE, RowsData
from rlmm.config.optimization import Optimization, divides
from rlmm.config.policy import Lora
from rlmm.config.sampling import Writing
from rlmm.objectives.dpo import Loss
from rlmm.objectives.legality import IllegalObjective, LogProbKind, check_legal
from rlmm.objectives.noise import SCHEME_KINDS, Scheme, check_draws


class PairNoise(Strict):
    """What a masked policy's log-probs of a pair are estimated with: masks that its two images, policy and reference
    share."""

    scheme: Scheme = "stratified"
    """One of those that estimate the ELBO: DPO compares likelihoods."""
    draws: int = Field(4, ge=1)
    """At least 2: how much they differ is what tells the noise of their mean."""
    bias_ceiling: float = Field(0.1, gt=0)
    """Nats a pair by which the noise of the margins may bias the loss, as estimated, in a step's mean; past it the run
    stops."""

    @model_validator(mode="after")
    def _estimates_a_likelihood(self) -> "PairNoise":
        try:
            check_legal("dpo", SCHEME_KINDS[self.scheme])
        except IllegalObjective as error:
            sound = [scheme for scheme, kind in SCHEME_KINDS.items() if kind is LogProbKind.ELBO]
            raise ValueError(
                f"noise.scheme {self.scheme!r}: {error} Schemes of the last: {', '.join(sound)}"
            ) from error
        check_draws(self.scheme, self.draws)
        if self.draws < 2:
            raise ValueError(
                "noise.draws is 1, and how far noise may bias the loss is told by how much draws differ; use 2 or more"
            )
        return self


class PreferenceData(Strict):
    """Rows of preferences in TRL's columns: what `rlmm pairs` writes, or a public set. Answers are images, or texts
    where the policy writes any. Columns `chosen_codes` and `rejected_codes`, where there are any, are read in place of
    the images."""

    path: str
    """A file, a glob of files, a folder of images, or with `format: hub` a dataset id on the Hugging Face hub."""
    format: Literal["auto", "parquet", "json", "csv", "images", "hub"] = "auto"
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    completion_column: str | None = None
    """Unpaired rows, for loss kto: the image, and `label_column` says whether it is wanted (TRL's `completion`)."""
    label_column: str = "label"
    sources_column: str | None = None
    """The image, or list of images, that the prompt is about; null: the column `sources`, `images` or `image`, where
    there is one."""
    image_root: str | None = None
    """The folder image paths are relative to; by default the folder of the (first) file."""
    resize: Literal["crop", "pad", "stretch"] = "crop"
    """How an image of another shape is brought to the codec's size."""
    streaming: bool = False
    limit: int | None = Field(None, ge=1)
    """Use only the first rows."""
    max_excluded_share: float = Field(MAX_EXCLUDED_SHARE, ge=0, le=1)
    """More bad pairs than this share of the rows are an error."""
    cache_dir: str | None = None

    @model_validator(mode="after")
    def _can_be_read(self) -> "PreferenceData":
        self.rows()
        return self

    def rows(self) -> RowsData:
        """The settings that rows of any kind are read with."""
        shared = set(RowsData.model_fields) & set(type(self).model_fields)
        return RowsData.model_validate({name: getattr(self, name) for name in shared})


class PairedUnderstanding(Strict):
    """Beside each pair of images the pair of answers about a picture that comes with it (Pair-DPO: HermesFlow, arXiv
    2502.12148)."""

    weight: float = Field(1.0, gt=0)
    """Of the answers' loss, beside `generation_weight` of the images'."""
    writing: Writing | None = None
    """How the question is written; null: as the pairs stage asked it."""


class DpoStage(Optimization):
    """Learning from preferences, against a frozen reference (Rafailov et al. 2023, arXiv 2305.18290)."""

    kind: Literal["dpo"] = "dpo"
    start_from: str | None = None
    reference: str | None = None
    """The stage whose policy is the reference, or `policy` for the recipe's own; null: the policy this stage starts
    from."""
    pairs: str | None = None
    """A pairs stage before this one."""
    data: PreferenceData | None = None
    """Preferences from elsewhere, in place of `pairs`."""
    loss: Literal[Loss, "kto"] = "sigmoid"
    """kto takes each image by itself, wanted or not, without its rival (arXiv 2402.01306)."""
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the labels that is taken to be wrong."""
    per_token: bool = False
    """Divide each log-ratio by its decided tokens, so that beta is a token's: an image of 1,024 codes has margins a
    thousand times a word's."""
    sft_weight: float = Field(0.0, ge=0)
    """Of the negative log-likelihood of what was chosen, in nats a token (arXiv 2404.19733)."""
    desirable_weight: float = Field(1.0, gt=0)
    """Of wanted images, under loss kto."""
    undesirable_weight: float = Field(1.0, gt=0)
    generation_weight: float = Field(1.0, gt=0)
    """Of the loss of images, beside that of `understanding`."""
    understanding: PairedUnderstanding | None = None
    batch_size: int = Field(16, ge=1)
    """Pairs a step; under loss kto images."""
    micro_batch_size: int = Field(16, ge=1)
    writing: Writing = Writing()
    """How prompts of pairs with a thought before the image are written."""
    noise: PairNoise | None = None
    """Of a masked policy alone; its defaults where nothing is said."""
    lora: Lora | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "DpoStage":
        divides(self.batch_size, self.micro_batch_size, "batch_size", "micro_batch_size")
        if (self.pairs is None) == (self.data is None):
            raise ValueError("give either `pairs`, a pairs stage before this one, or `data`, other preferences")
        if self.understanding is None and self.generation_weight != 1:
            raise ValueError("generation_weight is beside understanding.weight, and there is no understanding; drop it")
        if self.understanding is not None and (self.loss == "kto" or self.writing != Writing()):
            raise ValueError("understanding is of pairs of plain images: not with loss kto, and not with `writing`")
        if self.loss == "kto":
            if self.batch_size < 2:
                raise ValueError("loss kto reads other rows' answers, too; give a batch_size of 2 or more")
            if self.label_smoothing:
                raise ValueError("label_smoothing is of pairs, and loss kto has none; set it to 0")
        elif (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ValueError(f"desirable_weight and undesirable_weight are of loss kto, not {self.loss}")
        if self.data is not None and self.data.completion_column is not None and self.loss != "kto":
            raise ValueError(f"data.completion_column: unpaired rows have no margin for loss {self.loss}; use loss kto")
        return self
