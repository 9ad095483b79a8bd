"""The PP-OCR line recogniser that ships in the rapidocr wheel, called in batches through onnxruntime.

The text detector is left out: on a crop that holds one line it costs a hundred times the recogniser. The
graph's last softmax over 18,710 characters is replaced by an argmax, which reads the same text in about half
the time.
"""

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from PIL import Image

BUNDLED_MODEL = "PP-OCRv6_rec_small.onnx"
NATIVE_HEIGHT = 48
WIDTH_STEP = 16
"""Widths are multiples of this, so that images of nearly one width share a batch."""
MAX_WIDTH = 1920
INK_CONTRAST = 64
"""Grey levels (0-255) by which a pixel must differ from the background to count as ink."""
BLANK = 0
"""The CTC blank's class; class i is character i - 1, the last class is the space."""


def bundled_model() -> Path:
    """Path of the recogniser in the installed rapidocr package (found without importing it)."""
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the ocr reward needs the model in the rapidocr package: pip install 'rlmm[ocr]'")
    path = Path(spec.origin).parent / "models" / BUNDLED_MODEL
    if not path.exists():
        raise FileNotFoundError(f"this rapidocr ships no {BUNDLED_MODEL} (looked at {path}); give `model` a path")
    return path


def _argmax_graph(path: Path, characters: str | None) -> tuple[bytes, list[str]]:
    """The recogniser as a serialised graph that answers class indices [B, T], and the text of each class.

    `characters` limits the classes to the blank and these characters. Any image height is let through (the
    graph is convolutional; the published one pins it to 48).
    """
    model = onnx.load(path)
    graph = model.graph
    meta = {entry.key: entry.value for entry in model.metadata_props}
    table = ["", *meta.get("character", "").split("\n"), " "]
    heads = [item for item in graph.initializer if item.dims and item.dims[-1] == len(table)]
    softmax = graph.node[-1]
    if softmax.op_type != "Softmax" or not heads:
        raise ValueError(
            f"{path} is not a PP-OCR recogniser: it should end in a softmax over its {len(table)} "
            f"characters, and ends in {softmax.op_type}"
        )
    if characters is not None:
        if missing := sorted(set(characters) - set(table)):
            raise ValueError(f"the recogniser {path.name} knows no {' '.join(map(repr, missing))}")
        kept = [BLANK] + [index for index, text in enumerate(table) if text and text in characters]
        table = [table[index] for index in kept]
        for item in heads:
            item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item)[..., kept], item.name))
    graph.node[-1].CopyFrom(onnx.helper.make_node("ArgMax", softmax.input, ["classes"], axis=-1, keepdims=0))
    del graph.output[:], graph.value_info[:]
    graph.output.append(onnx.helper.make_tensor_value_info("classes", onnx.TensorProto.INT64, None))
    graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    return model.SerializeToString(), table


def _ink_columns(grey: np.ndarray) -> tuple[int, int]:
    """Columns [start, end) of a grey image [H, W] that hold its ink and a margin; all of them where there is
    none.
    """
    height, width = grey.shape
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.flatnonzero((np.abs(grey - np.median(border)) > INK_CONTRAST).any(axis=0))
    if ink.size == 0:
        return 0, width
    margin = max(1, height // 8)
    return max(0, int(ink[0]) - margin), min(width, int(ink[-1]) + 1 + margin)


class PaddleReader:
    """Reads one line of text (a word or several) from each image.

    The image is cropped to the columns that hold ink and resized to `height` pixels; its width follows the
    aspect ratio times `width_scale`, rounded to a multiple of 16. `height` 48 is the model's own; 32 takes a
    third of the time and fits images that are 32 pixels high. `characters` limits what can be read (None: all
    18,708). `model` is the path of another PP-OCR recogniser. An image's reading does not depend on its
    batch.
    """

    name = "pp-ocr"

    def __init__(
        self,
        *,
        model: str | Path | None = None,
        height: int = NATIVE_HEIGHT,
        width_scale: float = 1.0,
        characters: str | None = None,
        batch_size: int = 8,
        threads: int = 1,
    ) -> None:
        if height < 16 or width_scale <= 0 or batch_size < 1 or threads < 1:
            raise ValueError(
                "the recogniser needs height >= 16, width_scale > 0, batch_size >= 1 and threads >= 1; "
                f"got {height=}, {width_scale=}, {batch_size=}, {threads=}"
            )
        path = bundled_model() if model is None else Path(model)
        if not path.exists():
            raise FileNotFoundError(f"there is no OCR model at {path}")
        graph, self._table = _argmax_graph(path, characters)
        self.height = height
        self.width_scale = width_scale
        self.batch_size = batch_size
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        digest = hashlib.sha256(graph).hexdigest()[:16]
        self._fingerprint = f"pp-ocr {path.name} {digest} height={height} width_scale={width_scale} crop=1"

    def fingerprint(self) -> str:
        """Model file, content hash of the graph in use, and settings."""
        return self._fingerprint

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """The text of each RGB image, in order; '' where nothing is read."""
        pixels = [self._prepare(image) for image in images]
        texts = [""] * len(pixels)
        for chunk in self._chunks([item.shape[2] for item in pixels]):
            (classes_BT,) = self._session.run(None, {self._input: np.stack([pixels[index] for index in chunk])})
            for index, classes_T in zip(chunk, np.asarray(classes_BT), strict=True):
                texts[index] = self._decode(classes_T)
        return texts

    def _prepare(self, image: Image.Image) -> np.ndarray:
        """Float32 pixels [3, height, W] in [-1, 1], channels in the model's BGR order."""
        start, end = _ink_columns(np.asarray(image.convert("L"), dtype=np.float32))
        wide = (end - start) * self.height / image.height * self.width_scale
        width = min(MAX_WIDTH, max(WIDTH_STEP, round(wide / WIDTH_STEP) * WIDTH_STEP))
        box = (start, 0, end, image.height)
        resized = image.resize((width, self.height), Image.Resampling.BILINEAR, box=box)
        bgr_HWC = np.asarray(resized, dtype=np.float32)[:, :, ::-1]
        return bgr_HWC.transpose(2, 0, 1) / 127.5 - 1.0

    def _chunks(self, widths: Sequence[int]) -> Iterator[list[int]]:
        """Indices in chunks of at most `batch_size`, each chunk of one width."""
        by_width: dict[int, list[int]] = {}
        for index, width in enumerate(widths):
            by_width.setdefault(width, []).append(index)
        for indices in by_width.values():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _decode(self, classes_T: np.ndarray) -> str:
        """Greedy CTC: repeats are merged, then blanks dropped."""
        fresh = np.diff(classes_T, prepend=BLANK) != 0
        return "".join(self._table[index] for index in classes_T[fresh & (classes_T != BLANK)]).strip()
