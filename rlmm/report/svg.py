"""Matplotlib figures to SVG that stands inside HTML and follows the page's colour scheme and fonts.

Matplotlib is given stand-in colours; `inline_svg` replaces each by `var(--name)`, makes ids unique on the
page and leaves text as text.
"""

import re
from io import StringIO

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

N_COLOURS = 7
INK, MUTED, GRID, PAPER = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
_STAND_INS = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    f"#0b00{index:02x}": f"--series-{index}" for index in range(N_COLOURS)
}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.labelpad": 6.0,
    "axes.titlesize": 9.0,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.solid_capstyle": "round",
}

TICKS = StrMethodFormatter("{x:.6g}")
"""Plain numbers at every tick: no factor or offset written aside. A change of an axis's scale resets it."""

WIDE, SMALL = (11.4, 3.9), (4.2, 2.1)
"""Figure sizes in inches: the full width of the page, and one cell of a grid of small plots."""


def new_figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """An empty figure in the page's style; call it inside `matplotlib.rc_context(STYLE)`."""
    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    width, height = size
    # Margins in inches, wide enough for eight characters; an automatic layout would draw everything twice.
    left, right, bottom = 0.66 / width, 1 - 0.1 / width, 0.5 / height
    top = 1 - (0.26 if size == WIDE else 0.1) / height  # a wide plot names its y axis above it
    figure.subplots_adjust(left=left, right=right, bottom=bottom, top=top)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="y", nbins=5)
    axes.yaxis.set_major_formatter(TICKS)
    return figure, axes


def stand_in(slot: int) -> str:
    """The stand-in of a colour slot; slots repeat after `N_COLOURS`."""
    return f"#0b00{slot % N_COLOURS:02x}"


def inline_svg(figure: Figure, key: str, alt: str) -> Markup:
    """SVG for use inside HTML; `key` is unique on the page, of letters, digits and hyphens only."""
    buffer = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", text)
    for colour, name in _STAND_INS.items():
        text = text.replace(colour, f"var({name})")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes a viewBox into every SVG"
    # Labels were escaped by matplotlib's XML writer.
    head = Markup('<svg {} role="img" aria-label="{}">').format(Markup(box.group()), alt)
    return head + Markup(text[text.index(">") + 1 :])
