"""Cosines and variance of every estimate's gradient as a picture, a row a stage of rollouts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COSINES = {
    "trajectory": ("o", "with the exact trajectory's"),
    "elbo": ("s", "with the ELBO's"),
    "step": ("^", "of one step with the expected reward's"),
}


def write_plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Means over starts as marks, where every start has a value; each start as a dot."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    most = max(len({row["estimator"] for row in rows if row["stage"] == stage}) for stage in stages)
    figure, drawn = plt.subplots(
        len(stages), 2, figsize=(10, 1.2 + 0.3 * most * len(stages)), layout="constrained", squeeze=False, sharey="row"
    )
    for line, stage in zip(drawn, stages, strict=True):
        chosen = [row for row in rows if row["stage"] == stage]
        names = list(dict.fromkeys(row["estimator"] for row in chosen))
        for colour, (column, (mark, label)) in enumerate(COSINES.items()):
            _marks(line[0], chosen, names, column, mark, label, f"C{colour}")
        _marks(line[1], chosen, names, "variance", "o", "", "C3")
        line[0].set_yticks(range(len(names)), names)
        line[0].invert_yaxis()
        line[0].set_title(f"rollouts of {stage}: cosine", fontsize=10)
        line[1].set_title("variance over plans / squared mean", fontsize=10)
        for axes in line:
            axes.grid(alpha=0.3)
    figure.legend(*drawn[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=140)
    plt.close(figure)


def _marks(
    axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str], column: str, mark: str, label: str, colour: str
) -> None:
    points = [
        (at, row[column])
        for at, name in enumerate(names)
        for row in rows
        if row["estimator"] == name and row[column] is not None
    ]
    starts, told = len({row["run"] for row in rows}), [at for at, _ in points]
    places = [at for at in range(len(names)) if told.count(at) == starts]
    means = [fmean(value for at, value in points if at == place) for place in places]
    axes.plot(means, places, mark, color=colour, label=label)
    axes.plot([value for _, value in points], told, ".", color=colour, alpha=0.4, markersize=4)
