"""Which logged figures stand together in a plot, what the plot is called, and how to read it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlmm.report.plots import Line, Plot, ends, line_plot
from rlmm.report.records import Stage
from rlmm.report.svg import SMALL

BLUE, AMBER, TEAL, VIOLET = 1, 2, 3, 4


@dataclass(frozen=True)
class Panel:
    """A plot to make where at least one of its keys was logged. The first key gives the figure named in
    words.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    caption: str
    log: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot with its words. `reading` is what its main curve did; `alarm` is set where a gate was passed."""

    title: str
    caption: str
    plot: Plot
    reading: str = ""
    alarm: str = ""


HEALTH = (
    Panel(
        "mismatch",
        "Sampler and trainer agree",
        ("mismatch/mean", "mismatch/max"),
        "Difference, in nats, between the log-probability at which a token was sampled and the one the "
        "trainer gives it before the first update. It should stay at rounding error: growth means the two "
        "follow different laws.",
        log=True,
    ),
    Panel(
        "flat",
        "Flat groups",
        ("group/flat_share",),
        "Share of prompts whose samples all got the same reward, so nothing can be learned from them. Near"
        " 1 there is no signal left; a slow rise is normal as prompts are mastered.",
    ),
    Panel(
        "excluded",
        "Samples without a score",
        ("sample/unavailable_share", "sample/invalid_share"),
        "Unavailable: the judge failed, and the sample was left out. Invalid: the output could not be "
        "judged and got the configured penalty. Both should be near 0.",
    ),
    Panel(
        "duplicates",
        "Duplicate rollouts",
        ("sample/duplicate_share",),
        "Share of samples identical, token by token, to another one of their group. A jump points to "
        "collapse or to a seeding error.",
    ),
    Panel(
        "diversity",
        "Diversity",
        ("diversity",),
        "Mean distance between two samples of one prompt: 0 when all are the same. A steady fall is the "
        "price of sharpening; a collapse is not.",
    ),
    Panel(
        "entropy",
        "Entropy",
        ("entropy",),
        "Mean entropy of the token distributions, in nats. It falls as the policy grows sure; once near 0,"
        " it no longer explores.",
    ),
    Panel(
        "kl",
        "Divergence from the reference",
        ("kl",),
        "Estimated KL divergence from the policy the stage began with, in nats a token. It says how far "
        "the policy has moved.",
    ),
    Panel(
        "clip",
        "Clip fraction",
        ("clip_fraction",),
        "Share of tokens whose ratio was clipped. 0 with one update a rollout; above about 0.2, updates "
        "are too large or rollouts too old.",
    ),
    Panel(
        "ess",
        "Effective sample size",
        ("ess",),
        "How many samples' worth of information the importance weights leave, as a share. 1 is fully on-"
        "policy; a low value means a few samples dominate.",
    ),
    Panel(
        "grad",
        "Gradient norm",
        ("grad_norm",),
        "Length of the gradient before clipping. Spikes are worth a look; 0 means nothing is being learned.",
    ),
    Panel(
        "loss",
        "Loss",
        ("loss",),
        "The surrogate objective. Its level means little; it is here for completeness.",
    ),
    Panel("rate", "Learning rate", ("learning_rate",), "The schedule as it was applied."),
)

SFT = (
    Panel(
        "loss",
        "Loss",
        ("loss", "loss/image", "loss/text"),
        "Negative log-likelihood of the training targets, in nats a token. It should fall and then level off.",
    ),
    Panel("grad", "Gradient norm", ("grad_norm",), "Length of the gradient before clipping."),
    Panel("rate", "Learning rate", ("learning_rate",), "The schedule as it was applied."),
)

CODEC = (
    Panel("loss", "Loss", ("loss",), "Reconstruction loss of the image tokenizer. It should fall and level off."),
    Panel(
        "psnr",
        "Reconstruction quality",
        ("psnr_db",),
        "Peak signal-to-noise ratio of images encoded and decoded again, in dB. Every 6 dB halve the "
        "error; it bounds what any policy can draw.",
    ),
    Panel(
        "use",
        "Codebook use",
        ("codebook_use",),
        "Share of the codes that occur at all. A low share means a vocabulary larger than what is used.",
    ),
    Panel(
        "perplexity",
        "Codebook perplexity",
        ("codebook_perplexity",),
        "How many codes would be in use if all were equally frequent.",
    ),
)

PANELS: Mapping[str, Sequence[Panel]] = {"codec": CODEC, "sft": SFT}
"""By a stage's kind; every other kind that logs one of HEALTH's keys gets HEALTH."""


def panel_figures(stage: Stage, prefix: str) -> list[Figure]:
    """The small plots of a stage, where something was logged. `prefix` keeps SVG ids apart."""
    figures = []
    for panel in PANELS.get(stage.kind, HEALTH):
        there = [key for key in panel.keys if key in stage.curves]
        if there:
            figures.append(_figure(panel, there, stage, prefix))
    return figures


def reward_figure(stage: Stage, prefix: str) -> Figure | None:
    """The trained reward with a band of one standard deviation."""
    reward = stage.curves.get("reward/mean")
    if reward is None:
        return None
    terms = [k for k in stage.curves if k.startswith("reward/") and k.endswith("/mean") and k != "reward/mean"]
    lines = [Line("reward", reward, BLUE, stage.curves.get("reward/std"))]
    if len(terms) > 1:
        names = [(key, key.removeprefix("reward/").removesuffix("/mean")) for key in terms]
        lines += [Line(name, stage.curves[key], AMBER + slot) for slot, (key, name) in enumerate(names)]
    plot = line_plot(f"{prefix}-reward", lines, y_label="reward")
    caption = (
        "Mean reward of each step's rollouts: thin as logged, thick smoothed, the band one standard "
        "deviation to either side. A rising line with a band that narrows from below means that the worst "
        "samples got better."
    )
    return Figure("Reward trained on", caption, plot, f"{ends(reward)} (first and last tenth)")


def judges_figure(stage: Stage, prefix: str, parted: bool) -> Figure | None:
    """The trained reward against each held-out judge; `parted` is what `findings.divergence` said."""
    reward = stage.curves.get("reward/mean")
    held = {k: c for k, c in stage.curves.items() if k.startswith("held_out/") and k.endswith("/mean")}
    if reward is None or not held:
        return None
    lines = [Line("trained reward", reward, BLUE)]
    for slot, (key, curve) in enumerate(held.items()):
        name = key.removeprefix("held_out/").removesuffix("/mean")
        lines.append(Line(f"{name} (held out)", curve, AMBER + slot))
    caption = (
        "The held-out judge scores the same rollouts and is never trained on. The two should rise "
        "together; where the trained reward rises and the held-out one falls, the policy is learning the "
        "judge's weaknesses."
    )
    alarm = "The trained reward rose while a held-out judge fell." if parted else ""
    reading = "; ".join(f"{line.label} {ends(line.curve)}" for line in lines[1:])
    plot = line_plot(f"{prefix}-judges", lines, y_label="mean score")
    return Figure("Trained reward against held-out judge", caption, plot, reading, alarm)


def _figure(panel: Panel, keys: Sequence[str], stage: Stage, prefix: str) -> Figure:
    lines = [
        Line(_label(key), stage.curves[key], BLUE + slot, ceiling=stage.gates.get(key)) for slot, key in enumerate(keys)
    ]
    plot = line_plot(f"{prefix}-{panel.name}", lines, size=SMALL, log=panel.log)
    alarms = [_passed(line) for line in lines if line.ceiling is not None]
    return Figure(panel.title, panel.caption, plot, ends(lines[0].curve), " ".join(filter(None, alarms)))


def _passed(line: Line) -> str:
    points = zip(line.curve.steps, line.curve.values, strict=True)
    above = [step for step, value in points if line.ceiling is not None and value > line.ceiling]
    if not above:
        return ""
    return f"{line.label}: above the gate of {line.ceiling:g} at {len(above)} step(s), first {above[0]}."


def _label(key: str) -> str:
    first, _, rest = key.partition("/")
    return (rest or first).removesuffix("_share").replace("_", " ")
