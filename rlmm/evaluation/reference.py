"""The pictures that the arms' pictures are held against: training targets, as they are and as the codec draws them."""

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlmm.codecs import Codec, images_to_tensor, tensor_to_images
from rlmm.data import build_dataset
from rlmm.train import experience as phases
from rlmm.train.context import StageContext

PICTURES = 256
TARGET, RECONSTRUCTION = "training picture", "training picture through the codec"


def write_reference(context: StageContext, codec: Codec) -> None:
    """Leaves reference.parquet in the stage's folder: `kind`, `prompt` and `image` (PNG) of the first training targets,
    each twice, since edges that the codec cannot draw are no fault of a policy (once where it cannot draw without one).
    No file where no row has a target.
    """
    data = build_dataset(context.recipe.data, "train", context.recipe.seed)
    rows = [data[index] for index in range(min(PICTURES, len(data)))]
    size = codec.image_size[1], codec.image_size[0]
    there = [(row.prompt, row.target) for row in rows if row.target is not None and row.target.size == size]
    if not there:
        context.say(
            "no training row has a target image of the codec's size: the report compares with the first rollouts"
        )
        return
    codec.eval()
    with torch.no_grad():
        shown = images_to_tensor([image for _, image in there], codec)
        drawn = [] if codec.reads_hidden else tensor_to_images(codec.decode(codec.encode(shown)))
    kinds = ((TARGET, tensor_to_images(shown)), *(((RECONSTRUCTION, drawn),) if drawn else ()))
    table = [
        {"kind": kind, "prompt": prompt, "image": phases.png_bytes(image)}
        for kind, images in kinds
        for (prompt, _), image in zip(there, images, strict=True)
    ]
    partial = context.folder / "reference.partial"
    pq.write_table(pa.Table.from_pylist(table), partial)
    partial.replace(context.folder / "reference.parquet")
