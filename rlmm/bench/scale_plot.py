"""How cost grows, as a picture: seconds above, bytes of the update below, a column an axis."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

NAMES = {"rows": "rows", "tokens": "image tokens a row", "model": "parameters", "processes": "processes"}
"""The axes that something can grow along."""
GIB = 1 << 30


def write_plot(
    rows: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Any]], base: Mapping[str, Any], file: Path
) -> None:
    """Both scales logarithmic, so that a power is a straight line; dotted, what would grow as the axis does, and along
    processes what would be shared out evenly."""
    names = [name for name, values in axes.items() if name in NAMES and set(values) - {base[name]}]
    figure, drawn = plt.subplots(2, len(names), figsize=(3.3 * len(names), 5.2), layout="constrained", squeeze=False)
    for column, name in enumerate(names):
        chosen = [row for row in rows if {**row["point"], name: base[name]} == base]
        x = [float(row["parameters"] if name == "model" else row["point"][name]) for row in chosen]
        found, power = sorted(zip(x, chosen, strict=True), key=lambda pair: pair[0]), -1 if name == "processes" else 1
        _lines(drawn[0][column], found, {"rollout": ("rollout_s", 1), "update": ("update_s", 1)}, power)
        _lines(drawn[1][column], found, {"update": ("peak", GIB), "planned": ("planned", GIB)}, power)
        drawn[1][column].set_xlabel(NAMES[name])
    drawn[0][0].set_ylabel("seconds")
    drawn[1][0].set_ylabel("memory of the update, GiB")
    for line in drawn:
        line[0].legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=140)
    plt.close(figure)


def _lines(
    axes: Axes, found: Sequence[tuple[float, Mapping[str, Any]]], columns: Mapping[str, tuple[str, float]], power: int
) -> None:
    x = [value for value, _ in found]
    for colour, (label, (field, unit)) in enumerate(columns.items()):
        y = [row[field] / unit for _, row in found]
        axes.plot(x, y, "o-", label=label, color=f"C{colour}")
        axes.plot(x, [y[0] * (value / x[0]) ** power for value in x], ":", color=f"C{colour}", alpha=0.5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(x, [_short(value) for value in x])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else (*range(1, 10), 1.5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _short(value: float) -> str:
    for least, scale, letter in ((1e9, 1e9, "B"), (1e5, 1e6, "M")):
        if value >= least:
            return f"{value / scale:.3g}{letter}"
    return f"{value:g}"
