"""What a run shows, in plain words: the headline, its figures, and the warning when two judges part ways.

Every metric of an evaluation is taken to be better when higher.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlmm.report.plots import tenths
from rlmm.report.records import Contrast, Curve, Evaluation, Run, Stage

Tone = Literal["better", "worse", "open"]
JudgeRole = Literal["held out", "trained on", ""]


@dataclass(frozen=True)
class Finding:
    """One contrast as a tile: the difference, its interval, and what it says."""

    title: str
    difference: str
    interval: str
    detail: str
    tone: Tone


@dataclass(frozen=True)
class Headline:
    """The sentence on top of the page and the tiles under it."""

    sentence: str
    tone: Tone
    findings: tuple[Finding, ...]


def headline(run: Run, evaluation: Evaluation | None, rl_stages: Sequence[Stage]) -> Headline:
    """One contrast makes the sentence: a held-out judge goes before others, then each arm at its best temperature
    before both at the same (an arm that was only sharpened loses there), then the order they were written in.
    """
    roles = judge_roles(run.stages, run.config)
    contrasts = _ordered(evaluation.contrasts, roles) if evaluation else []
    if not evaluation or not contrasts:
        return Headline(_before_evaluation(rl_stages), "open", ())
    first = contrasts[0]
    findings = tuple(_finding(contrast, roles.get(contrast.judge, "")) for contrast in contrasts[:4])
    text = _sentence(first, evaluation, roles.get(first.judge, "")) + _unbeaten(first, contrasts)
    return Headline(text, tone(first), findings)


def leading(contrasts: Sequence[Contrast], roles: Mapping[str, JudgeRole]) -> Contrast | None:
    """The contrast that makes the headline."""
    return next(iter(_ordered(contrasts, roles)), None)


def _ordered(contrasts: Sequence[Contrast], roles: Mapping[str, JudgeRole]) -> list[Contrast]:
    return sorted(contrasts, key=lambda contrast: (roles.get(contrast.judge) == "trained on", contrast.at != "best"))


def judge_roles(stages: Sequence[Stage], config: Mapping[str, Any] | None = None) -> dict[str, JudgeRole]:
    """Which judges were trained on and which were held out, as the config says and the stages logged them. A held-out
    term that is a reward under another label was trained on; rewards that no stage learns from were not."""
    roles = _written_roles(config or {})
    for key in (key for stage in stages for key in stage.curves):
        name = key.removesuffix("/mean")
        if name.startswith("reward/") and name != "reward" and key.endswith("/mean"):
            roles[name.removeprefix("reward/")] = "trained on"
    for key in (key for stage in stages for key in stage.curves):
        if key.startswith("held_out/") and key.endswith("/mean"):
            roles.setdefault(key.removeprefix("held_out/").removesuffix("/mean"), "held out")
    return roles


def _written_roles(config: Mapping[str, Any]) -> dict[str, JudgeRole]:
    trained = [term for rewards in _learned_from(config) for term in _terms(rewards)]
    judges = {_judge(term) for term in trained}
    roles: dict[str, JudgeRole] = {_label(term): "trained on" for term in trained}
    for term in _terms(config.get("held_out")):
        roles[_label(term)] = "trained on" if _judge(term) in judges else "held out"
    return roles


def _learned_from(config: Mapping[str, Any]) -> list[Any]:
    """The reward sections of a resolved config that some stage learns from, or makes pairs by."""
    stages = config.get("stages")
    if not isinstance(stages, Mapping):
        return [config.get("rewards")]
    found = []
    for stage in (one for one in stages.values() if isinstance(one, Mapping)):
        if stage.get("kind") == "grpo":
            found.append(config.get("rewards"))
        elif stage.get("kind") == "pairs":
            judge, answers = ((stage.get(name) or {}).get("rewards") for name in ("judge", "understanding"))
            found += [judge or stage.get("rewards") or config.get("rewards"), answers]
    return found


def _terms(rewards: Any) -> list[Mapping[str, Any]]:
    return rewards.get("terms") or [] if isinstance(rewards, Mapping) else []


def _judge(term: Mapping[str, Any]) -> str:
    return term.get("name") or term.get("function") or ""


def _label(term: Mapping[str, Any]) -> str:
    return term.get("label") or _judge(term).rpartition(":")[2]


def tone(contrast: Contrast) -> Tone:
    """Whether the interval lies above 0, below it, or leaves the question open."""
    if contrast.low is None or contrast.high is None:
        return "open"
    if contrast.low > 0:
        return "better"
    return "worse" if contrast.high < 0 else "open"


def divergence(trained: Curve, held_out: Curve) -> bool:
    """Whether the trained reward rose while the held-out judge fell: the mark of a reward being gamed.

    The last third of the trained reward is compared with its first, that of the held-out judge with its first
    and its middle one. A change counts when it exceeds two standard errors of the difference of the means; a
    curve of fewer than 9 values shows none.
    """
    fell = min(change(held_out, "first"), change(held_out, "middle")) < 0
    return change(trained, "first") > 0 and fell


def change(curve: Curve, against: Literal["first", "middle"] = "first") -> int:
    """Whether the last third of a curve lies above an earlier third (1), below it (-1) or neither (0), by more than two
    standard errors.
    """
    values = [value for value in curve.values if not math.isnan(value)]
    third = len(values) // 3
    if third < 3:
        return 0
    earlier = values[:third] if against == "first" else values[third : 2 * third]
    later = values[-third:]
    means = [sum(part) / third for part in (earlier, later)]
    variances = [
        sum((v - mean) ** 2 for v in part) / (third - 1) for part, mean in zip((earlier, later), means, strict=True)
    ]
    difference, error = means[1] - means[0], math.sqrt(sum(variances) / third)
    return 0 if abs(difference) <= 2 * error else (1 if difference > 0 else -1)


def _sentence(contrast: Contrast, evaluation: Evaluation, role: JudgeRole) -> str:
    judge = {
        "held out": f"{contrast.judge}, a judge it was never trained on",
        "trained on": f"{contrast.judge}, the very judge it was trained on",
        "": contrast.judge,
    }[role]
    after = _mean(evaluation, contrast.arm, contrast.arm_temperature, contrast)
    before = _mean(evaluation, contrast.baseline, contrast.baseline_temperature, contrast)
    figures = (
        f": {contrast.metric} went from {before:.2f} to {after:.2f}" if after is not None and before is not None else ""
    )
    verdict = {
        "better": f"{contrast.arm} does better than {contrast.baseline}",
        "worse": f"{contrast.arm} does worse than {contrast.baseline}",
        "open": f"no difference between {contrast.arm} and {contrast.baseline} is shown",
    }[tone(contrast)]
    return f"On prompts kept out of training, {verdict} by {judge}{figures}."


def _unbeaten(first: Contrast, contrasts: Sequence[Contrast]) -> str:
    """An arm that beats its start says little where another arm, such as the same SFT given more compute, does as
    well: those it was compared with alike and does not beat."""
    if tone(first) != "better":
        return ""
    alike = (first.arm, first.judge, first.metric, first.at)
    rivals = [c for c in contrasts if (c.arm, c.judge, c.metric, c.at) == alike and tone(c) != "better"]
    told = [f"{c.baseline} ({signed(c.difference)} {interval(c.low, c.high, difference=True)})" for c in rivals]
    return f" It is not shown to be better than {' or '.join(told)}." if told else ""


def _finding(contrast: Contrast, role: JudgeRole) -> Finding:
    where = [f"{contrast.metric} by {contrast.judge}" + (f" ({role})" if role else "")]
    temperatures = (contrast.arm_temperature, contrast.baseline_temperature)
    if contrast.at == "best":
        where.append("each at its best temperature")
    if temperatures[0] is not None and temperatures[0] == temperatures[1]:
        where.append(f"both at T={temperatures[0]:g}")
    elif None not in temperatures:
        where.append(f"at T={temperatures[0]:g} against T={temperatures[1]:g}")
    return Finding(
        title=f"{contrast.arm} − {contrast.baseline}",
        difference=signed(contrast.difference),
        interval=interval(contrast.low, contrast.high, difference=True),
        detail=", ".join(where),
        tone=tone(contrast),
    )


def signed(value: float) -> str:
    """'+0.123'; with an exponent where three decimals would show a difference from 0 as none."""
    text = f"{value:+.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:+.1e}"
    return text.replace("-", "−", 1) if value < 0 else text


def interval(low: float | None, high: float | None, *, difference: bool = False) -> str:
    """'[+0.120, +0.240]' for a difference, '[0.120, 0.240]' for a mean, or 'no interval'."""
    if low is None or high is None:
        return "no interval"
    return f"[{signed(low)}, {signed(high)}]" if difference else f"[{low:.3f}, {high:.3f}]".replace("-", "−")


def _mean(evaluation: Evaluation, arm: str, temperature: float | None, contrast: Contrast) -> float | None:
    for row in evaluation.rows:
        if (row.arm, row.judge, row.metric) == (arm, contrast.judge, contrast.metric):
            if temperature is None or math.isclose(row.temperature, temperature):
                return row.mean
    return None


def _before_evaluation(rl_stages: Sequence[Stage]) -> str:
    for stage in reversed(rl_stages):
        reward = stage.curves.get("reward/mean")
        moved = tenths(reward) if reward else None
        if reward and moved:
            return (
                f"Not evaluated on held-out prompts yet. Over the {len(reward.steps)} steps of {stage.name}"
                f" so far, the reward it trains on went from {moved[0]:.2f} to {moved[1]:.2f}."
            )
    return "Nothing to compare yet: neither a held-out evaluation nor a reward has been logged."
