"""What a pairs stage leaves: pairs in TRL's columns, and how far apart their scores are."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlmm.codecs import Codec, codec_hash
from rlmm.train.checkpoint import write_json_atomically
from rlmm.train.drawn import Drawn, Found, Paired

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BINS = 20
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_COLUMNS: Mapping[str, pa.DataType] = {
    "prompt": pa.string(),
    "chosen": _IMAGE,
    "rejected": _IMAGE,
    "chosen_codes": pa.list_(pa.int32()),
    "rejected_codes": pa.list_(pa.int32()),
    "chosen_text": pa.string(),
    "rejected_text": pa.string(),
    "sources": pa.list_(_IMAGE),
    "chosen_score": pa.float64(),
    "rejected_score": pa.float64(),
    "margin": pa.float64(),
    "chosen_id": pa.string(),
    "rejected_id": pa.string(),
    "group_id": pa.string(),
    "origin": pa.string(),
    "file": pa.string(),
    "weights_version": pa.int64(),
    "law": pa.string(),
    "codec": pa.string(),
    "question": pa.string(),
    "picture": _IMAGE,
    "chosen_answer": pa.string(),
    "rejected_answer": pa.string(),
    "chosen_answer_score": pa.float64(),
    "rejected_answer_score": pa.float64(),
}
_FEATURES = {name: {"_type": "Image"} for name in ("chosen", "rejected", "picture")}
"""Columns that the `datasets` library is to show as images."""


def write_pairs(path: Path, pairs: Sequence[tuple[Paired, Paired | None]], codec: Codec, origin: str) -> None:
    """TRL's columns, codes beside the images, and of each pair the samples' ids and scores, the stage and file that
    they come from, the version of its weights, the law that they were drawn under and the codec of the codes. Beside
    it, where there is one, a pair of answers about the row's own picture."""
    mark = codec_hash(codec)
    rows = [
        _side("chosen", pair.chosen)
        | _side("rejected", pair.rejected)
        | {
            "prompt": pair.chosen.prompt,
            "sources": [{"bytes": png, "path": None} for png in pair.chosen.sources],
            "margin": pair.margin,
            "group_id": pair.chosen.group_id,
            "origin": origin,
            "file": pair.chosen.file,
            "weights_version": pair.chosen.weights_version,
            "law": pair.chosen.law,
            "codec": mark,
        }
        | ({} if answers is None else _answers(answers))
        for pair, answers in pairs
    ]
    table = pa.Table.from_pylist(rows, schema=pa.schema(_COLUMNS, metadata={"huggingface": json.dumps(_info())}))
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, path)


def _answers(pair: Paired) -> dict[str, Any]:
    return {
        "question": pair.chosen.prompt,
        "picture": {"bytes": pair.chosen.sources[0], "path": None},
        "chosen_answer": pair.chosen.text,
        "rejected_answer": pair.rejected.text,
        "chosen_answer_score": pair.chosen.candidate.score,
        "rejected_answer_score": pair.rejected.candidate.score,
    }


def _info() -> dict[str, Any]:
    """What `datasets` reads beside the table: the types of its columns."""
    plain = {"string": "string", "double": "float64", "int64": "int64"}
    features: dict[str, Any] = {
        name: {"dtype": plain[str(kind)], "_type": "Value"} for name, kind in _COLUMNS.items() if str(kind) in plain
    }
    features |= _FEATURES | {"sources": {"feature": {"_type": "Image"}, "_type": "List"}}
    for name in ("chosen_codes", "rejected_codes"):
        features[name] = {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}
    return {"info": {"features": {name: features[name] for name in _COLUMNS}}}


def _side(name: str, one: Drawn) -> dict[str, Any]:
    return {
        name: None if one.image is None else {"bytes": one.image, "path": None},
        f"{name}_codes": one.codes,
        f"{name}_text": one.text,
        f"{name}_score": one.candidate.score,
        f"{name}_id": one.sample_id,
    }


def write_report(folder: Path, found: Found, answers: Sequence[Paired] = ()) -> None:
    """margins.json: counts, what was left out and the first of it by name, and a histogram of the margins, of `answers`
    too where there are any; margins.png shows it."""
    record: dict[str, Any] = {
        "prompts": found.prompts,
        "samples": found.samples,
        "pairs": len(found.pairs),
        "prompts_without_a_pair": found.without,
        "left_out": dict(found.left_out),
        "named": found.named,
        **_margins(found.pairs),
    }
    if answers:
        record["answers"] = _margins(answers)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    axes[0].stairs(*record["histogram"].values(), fill=True, label="pictures")
    if answers:
        axes[0].stairs(*record["answers"]["histogram"].values(), linewidth=2, label="answers")
        axes[0].legend(fontsize=8)
    axes[0].set(xlabel="margin of a pair", ylabel="pairs", title=f"{len(found.pairs)} pairs of {found.prompts} prompts")
    scores = [[float(getattr(p, side).candidate.score) for p in found.pairs] for side in ("chosen", "rejected")]
    axes[1].hist(scores, bins=BINS, label=["chosen", "rejected"])
    axes[1].set(xlabel="score", title="Scores of either side")
    axes[1].legend(fontsize=8)
    figure.savefig(folder / "margins.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    write_json_atomically(folder / "margins.json", record)


def _margins(pairs: Sequence[Paired]) -> dict[str, Any]:
    margins = np.array([pair.margin for pair in pairs])
    counts, edges = np.histogram(margins, bins=BINS)
    return {
        "margin": {"mean": float(margins.mean()), "least": float(margins.min()), "most": float(margins.max())},
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }


def write_metrics(folder: Path, pictures: Sequence[Path], answers: Sequence[Path] = ()) -> None:
    """metrics.jsonl: of each batch that was drawn its scores and what it took, those of answers under names of their
    own; nothing where none was."""
    lines = []
    for place, path in enumerate(pictures):
        figures = _batch_figures(path)
        for name, value in _batch_figures(answers[place]).items() if answers else ():
            first, _, rest = name.partition("/")
            figures |= {name: figures[name] + value} if first == "time" else {f"{first}/understanding/{rest}": value}
        lines.append(json.dumps({"step": place + 1, **figures}) + "\n")
    if lines:
        partial = folder / "metrics.partial"
        partial.write_text("".join(lines))
        os.replace(partial, folder / "metrics.jsonl")


def _batch_figures(path: Path) -> dict[str, float]:
    table = pq.read_table(path, columns=["reward", "reward_status", "time/rollout", "time/score"])
    values = [value for value in table["reward"].to_pylist() if value is not None]
    figures = {f"time/{name}": table[f"time/{name}"][0].as_py() for name in ("rollout", "score")}
    unavailable = sum(status == "unavailable" for status in table["reward_status"].to_pylist())
    figures["sample/unavailable_share"] = unavailable / len(table)
    if values:
        figures |= {"score/mean": float(np.mean(values)), "score/std": float(np.std(values))}
    return figures
