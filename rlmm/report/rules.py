"""What a health figure is judged by: every threshold of the page, in one table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "look", "bad"]
CheckName = Literal[
    "sharpening",
    "cold_end",
    "arm_diversity",
    "diversity",
    "judges",
    "flat",
    "mismatch",
    "excluded",
    "canary",
    "duplicates",
    "blank",
    "across",
    "edges",
    "colours",
    "entropy",
    "kl",
    "clip",
    "ess",
    "grad",
]
WORST_FIRST: tuple[Status, ...] = ("bad", "look", "ok")


@dataclass(frozen=True)
class Rule:
    """From `look` on a figure wants a look, from `bad` on it is bad; the worse way is the way from `look` to `bad`.

    `figure` says what is measured, `also` what else sets the status. `bad` may be infinite: nothing is.
    """

    figure: str
    look: float
    bad: float
    also: str = ""

    def status(self, value: float) -> Status:
        """Of a value; NaN is bad."""
        if self.bad < self.look:
            return "bad" if not value > self.bad else "look" if value <= self.look else "ok"
        return "bad" if not value < self.bad else "look" if value >= self.look else "ok"

    @property
    def text(self) -> str:
        """The rule as the page states it."""
        way = "down" if self.bad < self.look else "up"
        limits = f"look from {self.look:g} {way}" + ("" if math.isinf(self.bad) else f", bad from {self.bad:g} {way}")
        return f"{self.figure}: {limits}.".replace("from -", "from −") + (f" {self.also}" if self.also else "")


RULES: Mapping[CheckName, Rule] = {
    "sharpening": Rule(
        "Share of the largest gain at one temperature that is left with each arm at its best",
        0.25,
        0.0,
        "Nothing counts as left where the interval of the gain at the best temperatures is not above 0. Where no "
        "gain is shown at any temperature: look, and bad where the arm is shown to be worse.",
    ),
    "cold_end": Rule(
        "The baseline's rise over its last step to the coldest temperature tried, if that is its best, as a share of "
        "the gain",
        0.5,
        math.inf,
    ),
    "arm_diversity": Rule("Diversity over that of the first arm at the same temperature, the lowest", 0.5, 0.2),
    "diversity": Rule("Diversity of the last tenth of the steps over that of the first", 0.5, 0.2),
    "judges": Rule(
        "Correlation of the two over the steps, if the trained reward rose",
        0.2,
        -0.2,
        "Bad also where the trained reward rose and the held-out one fell, each by more than two standard errors from "
        "third to third of the steps.",
    ),
    "flat": Rule("Share of flat groups, last tenth of the steps", 0.5, 0.9),
    "mismatch": Rule("Largest mean and largest single difference, over their tolerances", 0.5, 1.0),
    "excluded": Rule(
        "Share of samples without a score, the whole stage or its last tenth, whichever is more", 0.01, 0.1
    ),
    "canary": Rule(
        "Largest change of a frozen sample's score, in standard deviations of the frozen samples' first scores",
        0.1,
        0.5,
    ),
    "duplicates": Rule("Share of repeats within a group, by tokens or by looks, last tenth of the steps", 0.7, 0.95),
    "blank": Rule("Share of blank pictures beyond the reference's", 0.02, 0.1),
    "across": Rule(
        "Share of pairs of pictures of different prompts that look the same, beyond the reference's", 0.01, 0.05
    ),
    "edges": Rule("Factor between the edge density and the reference's, either way", 1.4, 2.0),
    "colours": Rule("Factor between the colour entropy and the reference's, either way", 1.4, 2.0),
    "entropy": Rule("Entropy of the last tenth of the steps over that of the first", 0.3, 0.1),
    "kl": Rule("Divergence in nats a token, last tenth of the steps", 0.5, 2.0),
    "clip": Rule("Share of clipped tokens, last tenth of the steps", 0.2, 0.4),
    "ess": Rule("Lowest effective sample size of a step", 0.5, 0.1),
    "grad": Rule("Largest gradient norm over the median", 10.0, 100.0, "Bad also where the median is 0."),
}


def worst(*statuses: Status) -> Status:
    """The worst of some; ok where there are none."""
    return min(statuses, key=WORST_FIRST.index, default="ok")


def factor(value: float, reference: float) -> float:
    """How many times the one is the other, whichever is larger: at least 1, infinite where one of them alone is 0."""
    if value == reference:
        return 1.0
    low, high = sorted((abs(value), abs(reference)))
    return high / low if low > 0 else math.inf
