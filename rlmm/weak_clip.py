"""A small CLIP trained on scenes: a judge right often enough to learn from, and weak enough to be over-optimised.

With the exact verifier of scenes as `held_out`, a run on it shows what a judge's weakness does to a policy.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rewards.scenes_spec import CELL, SIZE
from rlmm.config.data import ScenesData
from rlmm.data.scenes import build
from rlmm.seeds import derive, generator
from rlmm.train.processes import device

MERGES, END = 400, "</w>"
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
TEXT_TOKENS = 32


@dataclass(frozen=True)
class ClipPlan:
    """How the judge is trained. Fewer steps make a weaker one."""

    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 1e-3
    width: int = 64
    layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.layers) < 1 or self.batch_size < 2 or self.learning_rate <= 0 or self.width % 4:
            raise ValueError(
                "a CLIP needs steps and layers >= 1, batch_size >= 2 (a picture is told from the others of its batch), "
                f"learning_rate > 0 and a width of a multiple of 4; got {self}"
            )


def train_clip(data: ScenesData, plan: ClipPlan, out: Path, say: Callable[[str], None]) -> float:
    """Train on the scenes' pictures and prompts with CLIP's own loss (Radford et al. 2021, arXiv 2103.00020), and write
    model, tokenizer and image processor to the folder `out`, as `clip_score` takes them.

    Returns the share of held-out pictures whose prompt is found among eight. Raises ValueError for scenes without
    pictures to draw from a text, and for a folder that holds something.
    """
    if data.variant != "text_to_image":
        raise ValueError(f"a CLIP is trained on pictures of texts; variant {data.variant} has none, use text_to_image")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another folder")
    images, prompts = _pairs(data, "train", plan.seed)
    tokenizer, pictures = _tokenizer(prompts), CLIPImageProcessorPil(size=_edge(), crop_size=_square())
    torch.manual_seed(derive(plan.seed, "clip"))
    model = CLIPModel(_config(tokenizer, plan))
    torch.nn.Module.to(model, device())
    optimizer = torch.optim.AdamW(model.parameters(), plan.learning_rate, weight_decay=0.01)
    for step in range(plan.steps):
        rows = generator(plan.seed, "clip", step).choice(len(images), min(plan.batch_size, len(images)), replace=False)
        batch = _batch(tokenizer, pictures, [images[i] for i in rows], [prompts[i] for i in rows])
        loss = model(**batch, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == plan.steps:
            say(f"clip {step + 1}/{plan.steps}  loss {float(loss.detach()):.3f}")
    model.eval()
    for part in (model, tokenizer, pictures):
        part.save_pretrained(out)
    return matched(model, tokenizer, pictures, *_pairs(data, "held_out", plan.seed))


@torch.no_grad()
def matched(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    pictures: CLIPImageProcessorPil,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    choices: int = 8,
) -> float:
    """The share of pictures that fit their own prompt better than any of `choices` - 1 different ones."""
    batch = _batch(tokenizer, pictures, images, prompts)
    fits_BB = model(**batch).logits_per_image
    right = 0
    for row, prompt in enumerate(prompts):
        order = generator(0, "choices", row).permutation(len(prompts))
        others = [int(i) for i in order if prompts[i] != prompt][: choices - 1]
        right += bool((fits_BB[row, row] > fits_BB[row, others]).all())
    return right / len(prompts)


def _pairs(data: ScenesData, split: str, seed: int) -> tuple[list[Image.Image], list[str]]:
    read = build(data, split, seed)  # pyrefly: ignore
    rows = [row for at in range(len(read)) if (row := read[at]).target is not None]
    return [row.target for row in rows if row.target is not None], [row.prompt for row in rows]


def _batch(
    tokenizer: CLIPTokenizer, pictures: CLIPImageProcessorPil, images: Sequence[Image.Image], prompts: Sequence[str]
) -> dict[str, Tensor]:
    texts = tokenizer(list(prompts), padding=True, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
    pixels = pictures([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    return {name: value.to(device()) for name, value in {**texts, "pixel_values": pixels}.items()}


def _tokenizer(prompts: Sequence[str]) -> CLIPTokenizer:
    """CLIP's byte-pair encoding, learned from the prompts' words."""
    learned = Tokenizer(models.BPE(end_of_word_suffix=END))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(vocab_size=MERGES, end_of_word_suffix=END, show_progress=False)
    learned.train_from_iterator(prompts, trainer)
    found = json.loads(learned.to_str())["model"]
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,'-?!"]
    tokens = dict.fromkeys([*letters, *(letter + END for letter in letters), *found["vocab"], START_TOKEN, END_TOKEN])
    merges: Any = [tuple(pair) for pair in found["merges"]]  # pairs, whatever the annotation says
    return CLIPTokenizer(vocab={token: at for at, token in enumerate(tokens)}, merges=merges)


def _config(tokenizer: CLIPTokenizer, plan: ClipPlan) -> CLIPConfig:
    tower = {
        "hidden_size": plan.width, "intermediate_size": 2 * plan.width, "num_hidden_layers": plan.layers,
        "num_attention_heads": 4,
    }  # fmt: skip
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (START_TOKEN, END_TOKEN))
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": TEXT_TOKENS, "bos_token_id": start,
        "eos_token_id": end, "pad_token_id": end, **tower,
    }  # fmt: skip
    # A patch is half a cell, so that a shape's edges can be told.
    vision = {"image_size": SIZE, "patch_size": CELL // 2, **tower}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=plan.width)


def _edge() -> dict[str, int]:
    return {"shortest_edge": SIZE}


def _square() -> dict[str, int]:
    return {"height": SIZE, "width": SIZE}
