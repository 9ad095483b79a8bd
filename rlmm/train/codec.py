"""The codec stage: train the image tokenizer on the training images, and show what it keeps of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from rlmm.codecs import (
    Codec,
    build_codec,
    codec_loss,
    images_to_tensor,
    reconstruction_metrics,
    save_codec,
    tensor_to_images,
)
from rlmm.codecs.perceptual import PerceptualLoss
from rlmm.config.data import Split
from rlmm.config.stages import CodecStage
from rlmm.policies.casting import cast_inside
from rlmm.policies.parts import whole
from rlmm.seeds import epoch_indices
from rlmm.train.checkpoint import write_json_atomically
from rlmm.train.context import StageContext, load_split
from rlmm.train.metrics import Meter
from rlmm.train.processes import share, world
from rlmm.train.running import train
from rlmm.train.trainer import LossFn


@dataclass(frozen=True)
class ImageBatch:
    """images [B, C, H, W] float32 in [0, 1]; `share`: this micro-batch's part of the step's rows."""

    images: Tensor
    share: float

    def to(self, device: torch.device | str) -> "ImageBatch":
        return ImageBatch(self.images.to(device), self.share)


class ImageSource:
    """Step -> one micro-batch of images."""

    micro_batches_per_step = 1
    nothing_counts = False

    def __init__(self, images_NCHW: Tensor, batch_size: int, seed: int) -> None:
        self.images_NCHW, self.batch_size, self.seed = images_NCHW, batch_size, seed

    def micro_batches(self, step: int) -> Sequence[ImageBatch]:
        picked = epoch_indices(len(self.images_NCHW), step * self.batch_size, self.batch_size, self.seed)
        mine = picked[share(self.batch_size, "batch_size")]
        return [ImageBatch(self.images_NCHW[mine], len(mine) / len(picked))]


def training_images(context: StageContext, codec: Codec, split: Split, limit: int | None) -> Tensor:
    """Target images [N, C, H, W] of a split; ValueError where it has none."""
    data = load_split(context, split)
    rows = [data[i] for i in range(min(len(data), limit or len(data)))]
    images = [row.target for row in rows if row.target is not None]
    if not images:
        raise ValueError(
            f"no row of the {split} split has a target image to train the codec on; set data.target_column"
        )
    if len(images) < len(rows):
        context.say(f"{split} data: {len(rows) - len(images)} of {len(rows)} rows have no target image: left out")
    return images_to_tensor(images, codec)


def loss_function(config: CodecStage) -> LossFn:
    """The stage's loss. A perceptual network is kept in here, outside the codec and its checkpoints."""
    perceptual = PerceptualLoss(config.perceptual) if config.perceptual else None
    weight = config.perceptual.weight if config.perceptual else 0.0

    def loss_fn(model: nn.Module, batch: ImageBatch, meter: Meter) -> Tensor:
        device, half = batch.images.device, config.precision == "bfloat16"
        network = perceptual.to(device) if perceptual else None
        inside = cast_inside(getattr(model, "module", model), device.type, half)
        with inside, torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss, figures = codec_loss(model, batch.images, network, weight)
        for name, value in figures.items():
            meter.add(name, float(value))
        return loss * batch.share

    return loss_fn


def run_codec_stage(context: StageContext) -> None:
    """Train a codec; leaves codec/, reconstruction.png and reconstruction.json in the stage's folder."""
    config: CodecStage = context.config
    loss_fn = loss_function(config)
    assert context.recipe.codec is not None, "the recipe lets no checkpoint have a codec stage"
    with torch.random.fork_rng():
        torch.manual_seed(context.seed("weights"))
        codec = build_codec(context.recipe.codec)
    images = training_images(context, codec, "train", config.images)
    source = ImageSource(images, config.batch_size, context.seed("batches"))
    show = ["loss", "psnr_db", *(["perceptual"] if config.perceptual else []), "learning_rate", "grad_norm"]
    train(context, codec, source, loss_fn, Meter(), micro_batch_size=config.batch_size // world()[1], show=show)
    codec.eval()
    with whole(codec):
        if world()[0] == 0:
            _leave(context, codec)


def _leave(context: StageContext, codec: Codec) -> None:
    held_out = training_images(context, codec, "held_out", 256)
    with torch.no_grad():
        figures = reconstruction_metrics(codec, held_out)
        pairs = tensor_to_images(torch.cat([held_out[:12], codec.decode(codec.encode(held_out[:12])).cpu()]))
    write_json_atomically(context.folder / "reconstruction.json", {k: float(v) for k, v in figures.items()})
    reconstruction_sheet(pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :], context.folder / "reconstruction.png")
    save_codec(codec, context.folder / "codec")
    context.say("codec on held-out images: " + ", ".join(f"{name} {float(v):.3g}" for name, v in figures.items()))


def reconstruction_sheet(originals: Sequence[Image.Image], decoded: Sequence[Image.Image], path: Path) -> None:
    """A sheet of pairs: each original with its reconstruction below it."""
    width, height = originals[0].size
    columns, gap = 4, 4
    rows = -(-len(originals) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (2 * height + 2 * gap) + gap), "white")
    for i, (before, after) in enumerate(zip(originals, decoded, strict=True)):
        x = gap + (i % columns) * (width + gap)
        y = gap + (i // columns) * (2 * height + 2 * gap)
        sheet.paste(before.convert("RGB"), (x, y))
        sheet.paste(after.convert("RGB"), (x, y + height + gap // 2))
    sheet.save(path)
