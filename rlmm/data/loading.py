"""Finding and opening a data set's files, or a hub data set, with the `datasets` library; nothing is decoded
here."""

import glob
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from rlmm.config.data import RowsData

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
FAULTS = (DatasetsError, OSError, ValueError, TypeError, EOFError, zlib.error, pa.ArrowInvalid)
"""What `datasets` and the readers below it raise for files that are torn, or are not of one kind."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class RawRows:
    """Undecoded rows in file order, each a dict of all `columns`; `root` is where relative image paths
    start."""

    rows: Sequence[dict[str, Any]] | datasets.Dataset
    columns: list[str]
    root: Path | None
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def column(self, name: str) -> Iterator[Any]:
        """The cells of one column alone."""
        return iter(self.rows[name] if isinstance(self.rows, datasets.Dataset) else [row[name] for row in self.rows])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            yield dict(row)


def load_raw(config: RowsData, path: str, split: str) -> RawRows:
    """Rows of `path`, at most `config.limit`.

    Columns that some rows of a JSON file lack are null in those rows. With `streaming`, the rows read are
    kept in memory with their images still encoded. Raises ValueError, naming the path, for what cannot be
    found or read.
    """
    place = _place(config, path)
    with _said(place, config, split):
        if config.streaming:
            rows = _streamed(place.load(config, split, streaming=True), config.limit or 0)
        else:
            rows = _undecoded_table(place.load(config, split, streaming=False), config.limit)
    columns = rows.column_names if isinstance(rows, datasets.Dataset) else list(rows[0]) if rows else []
    return RawRows(rows, columns, place.root, path)


class FirstRows:
    """The first `count` rows of `config.path`, at most `config.limit`, one at a time and undecoded; files are read only
    so far. A column that a row lacks is null in it.

    Raises ValueError, as `load_raw` does, for what cannot be found, and while it is read for what cannot be.
    """

    def __init__(self, config: RowsData, count: int, columns: Collection[str] = ()) -> None:
        """`columns`: of parquet, what is read alone, where it says any."""
        place = _place(config, config.path)
        if columns and place.builder == "parquet":
            place = replace(place, arguments=place.arguments | {"columns": sorted(columns)})
        self._config, self._place = config, place
        self._count = min(count, config.limit or count)

    @property
    def root(self) -> Path | None:
        """Where relative image paths start."""
        return self._place.root

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _said(self._place, self._config, self._config.split):
            stream = self._place.load(self._config, self._config.split, streaming=True)
            for row in _undecoded_stream(stream).take(self._count):
                yield defaultdict(lambda: None, row)


@dataclass(frozen=True)
class _Place:
    """A data set's files, or its name on the hub, and what `datasets` reads it with."""

    path: str
    builder: str
    files: list[str]
    root: Path | None
    arguments: dict[str, Any]

    def load(self, config: RowsData, split: str, *, streaming: bool) -> Any:
        return datasets.load_dataset(
            self.builder, streaming=streaming, split=split, cache_dir=config.cache_dir, **self.arguments
        )


def _place(config: RowsData, path: str) -> _Place:
    own = None if config.image_root is None else Path(config.image_root)
    if config.format == "hub":
        return _Place(path, path, [], own, {"name": config.subset, "revision": config.revision})
    builder, files, root = _locate(path, config.format)
    arguments: dict[str, Any] = {"data_files": {"train": files}}
    if builder == "csv":
        arguments |= {"keep_default_na": False, "na_values": [""]}  # a prompt may be the word "null"
    return _Place(path, builder, files, own or root, arguments)


@contextmanager
def _said(place: _Place, config: RowsData, split: str) -> Iterator[None]:
    """What `datasets` finds wrong as a ValueError that names the file and says what to do."""
    try:
        yield
    except FAULTS as error:
        cause = error.__cause__ or error
        reader = "hub dataset" if config.format == "hub" else place.builder
        torn = _unreadable(place.builder, place.files) if len(place.files) > 1 else None
        raise ValueError(
            f"{place.path if torn is None else f'{torn}, a file of {place.path},'} (split {split!r}) cannot be read as "
            f"{reader}: {type(cause).__name__}: {cause}. Check the file, or set data.format"
        ) from error


def _unreadable(builder: str, files: Sequence[str]) -> str | None:
    """The first of the files that cannot be read by itself; what goes wrong among several says not in which."""
    for file in files:
        try:
            alone = datasets.load_dataset(builder, data_files={"train": [file]}, split="train", streaming=True)
            for _ in alone.with_format("arrow").iter(1000):  # undecoded
                pass
        except FAULTS:
            return file
    return None


def _locate(path: str, format: str) -> tuple[str, list[str], Path]:
    """(builder, files, folder that image paths are relative to) of a local path."""
    if Path(path).is_dir():
        return _locate_images(Path(path), format)
    files = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
    if not files and Path(path).is_file():  # a name with brackets in it
        files = [path]
    if not files:
        raise ValueError(
            f"there is no file {path} (data.path); for a dataset of the Hugging Face hub set data.format: hub"
        )
    if not any(Path(file).stat().st_size for file in files):
        raise ValueError(f"{path} is empty (data.path); give a file that has rows")
    if format == "images":
        raise ValueError(f"{path} is a file, and format: images wants the folder with its {METADATA[0]}")
    suffixes = {_suffix(file) for file in files}
    if format == "auto" and (len(suffixes) > 1 or not suffixes <= set(FORMATS)):
        raise ValueError(
            f"the format of {path} does not show in its extension ({', '.join(sorted(suffixes)) or 'none'}); "
            f"known: {', '.join(FORMATS)}, each also .gz; set data.format, or give files of one kind"
        )
    builder = FORMATS[suffixes.pop()] if format == "auto" else format
    return builder, files, Path(files[0]).parent


def _suffix(file: str) -> str:
    return Path(file.removesuffix(".gz")).suffix.lower()


def _locate_images(folder: Path, format: str) -> tuple[str, list[str], Path]:
    """A folder of images is read as the rows of its metadata file, so that a missing image is one row's
    fault."""
    if format not in ("auto", "images"):
        raise ValueError(f"{folder} is a folder; give the files, e.g. {folder}/*.{format}")
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if not found:
        raise ValueError(
            f"the folder {folder} has no {' or '.join(METADATA)}; an image folder needs one, with a row an"
            ' image: {"file_name": "0001.png", "prompt": "..."}; for other files give a glob, e.g. '
            f"{folder}/*.parquet"
        )
    return FORMATS[found[0].suffix], [str(found[0])], folder


def _streamed(loaded: datasets.IterableDataset, limit: int) -> list[dict[str, Any]]:
    rows = [dict(row) for row in _undecoded_stream(loaded).take(limit)]
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _undecoded_stream(loaded: datasets.IterableDataset) -> datasets.IterableDataset:
    return loaded if loaded.features is None else loaded.cast(_undecoded(loaded.features))


def _undecoded_table(loaded: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    # Same table, other reading instructions; `Dataset.cast` would copy every image to say the same.
    raw = datasets.Dataset(loaded.data, info=datasets.DatasetInfo(features=_undecoded(loaded.features)))
    return raw if limit is None else raw.take(min(limit, len(raw)))


def _undecoded(features: datasets.Features) -> datasets.Features:
    return datasets.Features({name: _undecoded_feature(kind) for name, kind in features.items()})


def _undecoded_feature(feature: Any) -> Any:
    """The same feature with images, audio and other media left encoded, at any depth; JSON is no medium."""
    if isinstance(feature, dict):
        return {name: _undecoded_feature(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_undecoded_feature(feature.feature))
    if hasattr(feature, "decode") and not isinstance(feature, datasets.Json):
        return replace(feature, decode=False)
    return feature
