"""Pictures laid out as the official scripts of a benchmark look for them, so that these run unchanged."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from rlmm.evaluation.benchmarks import BenchPrompt

Writer = Callable[[Path, int, BenchPrompt, Sequence[Image.Image]], None]


def _geneval(folder: Path, place: int, item: BenchPrompt, images: Sequence[Image.Image]) -> None:
    """<place>/metadata.jsonl and <place>/samples/<n>.png, as evaluation/evaluate_images.py reads them."""
    own = folder / f"{place:05d}"
    (own / "samples").mkdir(parents=True, exist_ok=True)
    (own / "metadata.jsonl").write_text(json.dumps(dict(item.row)))
    for number, image in enumerate(images):
        image.save(own / "samples" / f"{number:05d}.png")


def _compbench(folder: Path, place: int, item: BenchPrompt, images: Sequence[Image.Image]) -> None:
    """samples/<prompt>_<n>.png with n over all pictures, as BLIPvqa_eval and the others part the name."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / "samples" / f"{item.prompt}_{place * len(images) + number:06d}.png")


def _dpg(folder: Path, place: int, item: BenchPrompt, images: Sequence[Image.Image]) -> None:
    """<item_id>.png, up to four pictures in two columns, as compute_dpg_bench.py cuts them."""
    if len(images) > 4 or len({image.size for image in images}) > 1 or images[0].width != images[0].height:
        raise ValueError(
            f"compute_dpg_bench.py cuts one to four square pictures of one size from a sheet; got {len(images)} of "
            f"{', '.join(sorted({f'{i.width} x {i.height}' for i in images}))}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    side, columns = images[0].width, min(2, len(images))
    sheet = Image.new("RGB", (columns * side, -(-len(images) // 2) * side))
    for number, image in enumerate(images):
        sheet.paste(image.convert("RGB"), (number % 2 * side, number // 2 * side))
    sheet.save(folder / f"{item.key}.png")


def _longtext(folder: Path, place: int, item: BenchPrompt, images: Sequence[Image.Image]) -> None:
    """<prompt_id>_<n>.png with n from 1, as textbench/evaluate_text_reward.py reads the number before the stroke."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, 1):
        image.save(folder / f"{item.key}_{number}.png")


WRITERS: Mapping[str, Writer] = {
    "geneval": _geneval,
    "t2i_compbench": _compbench,
    "dpg_bench": _dpg,
    "longtext_bench": _longtext,
}
"""(folder, the prompt's place in its file, the prompt, its pictures) -> files."""

SAMPLES: Mapping[str, int] = {"geneval": 4, "t2i_compbench": 10, "dpg_bench": 4, "longtext_bench": 4}
"""Pictures a prompt that the benchmark's published numbers are of."""
