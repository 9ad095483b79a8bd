"""The Health section: rules, verdicts, and runs in which every check is made bad on purpose."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from PIL import Image, ImageFilter

from rlmm.report import write_report
from rlmm.report.checks import Check, Reading, correlation, judged, judges_check, measured
from rlmm.report.data import read_run
from rlmm.report.guards import arm_guards, figures, first_rollouts, one_a_step, reference_of, rollout_guards, spread
from rlmm.report.health import Health, health, updates_per_rollout
from rlmm.report.panels import Figure
from rlmm.report.plots import FrontierPoint, Plot, frontier_plot, tenths
from rlmm.report.records import Contrast, Curve, Diversity, EvalRow, Evaluation, Notes
from rlmm.report.rules import RULES, CheckName, Rule, factor, worst
from rlmm.report.sharpening import check as sharpening_check
from rlmm.report.sharpening import pairs
from tests.synthetic_run import WORDS, build_run, png, write_parquet

Line = dict[str, Any]
Spoil = Callable[[Path], None]
ROLES: Mapping[str, Any] = {"ocr": "trained on", "tesseract": "held out"}


def of_run(folder: Path) -> Health:
    run = read_run(folder)
    evaluated = next((stage for stage in run.stages if stage.evaluation), None)
    return health(run, [stage for stage in run.stages if stage.kind == "grpo"], evaluated)


def checks_of(found: Health) -> dict[str, Check]:
    return {check.name: check for part in found.parts for check in part.checks}


def edit_metrics(change: Callable[[int, Line], Line]) -> Spoil:
    """A change of every line of the GRPO stage's log, by its number from 0."""

    def spoil(folder: Path) -> None:
        path = folder / "stages/03-grpo/metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line | change(i, line)) + "\n" for i, line in enumerate(lines)))

    return spoil


def edit_pictures(draw: Callable[[int, str], bytes], where: str = "03-grpo/rollouts/*.parquet") -> Spoil:
    """Other pictures in stored parquet files, by the row's number and prompt."""

    def spoil(folder: Path) -> None:
        for path in (folder / "stages").glob(where):
            rows = pyarrow.parquet.read_table(path).to_pylist()
            write_parquet(path, [row | {"image": draw(i, row["prompt"])} for i, row in enumerate(rows)])

    return spoil


def edit_evaluation(change: Callable[[dict[str, Any]], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "stages/04-eval/eval.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def drawn(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def noise(row: int, prompt: str) -> bytes:
    pixels = np.random.default_rng(row).integers(0, 256, (32, 96, 3), np.uint8)
    return drawn(Image.fromarray(pixels))


def smooth(row: int, prompt: str) -> bytes:
    """The word out of focus: no pixel steps by a tenth of the range."""
    word = Image.open(BytesIO(png(prompt.split('"')[1], left=1 + 3 * (row % 8))))
    return drawn(word.filter(ImageFilter.GaussianBlur(4)))


def only_sharper(content: dict[str, Any]) -> None:
    for row in content["contrasts"]:
        if row["at"] in ("best", "0.4"):
            row.update(difference=0.01, low=-0.05, high=0.07)


def collapsed_arm(content: dict[str, Any]) -> None:
    for row in content["diversity"]:
        row["value"] *= 0.1 if row["arm"] == "grpo" else 1


BAD: Mapping[str, tuple[str, Spoil]] = {
    "sharpening": ("sharpened, 0.00 of the gain left", edit_evaluation(only_sharper)),
    "arm_diversity": ("grpo has 0.08 of sft's at T = 0.4", edit_evaluation(collapsed_arm)),
    "diversity": ("of what it was", edit_metrics(lambda i, line: {"diversity": 0.6 * 0.9**i})),
    "entropy": ("of what it was", edit_metrics(lambda i, line: {"entropy": 1.1 * 0.9**i})),
    "judges": (
        "tesseract: r = −1.00 over 40 steps, and it fell",
        edit_metrics(lambda i, line: {"held_out/tesseract/mean": 0.7 - 0.01 * i, "reward/mean": 0.5 + 0.01 * i}),
    ),
    "flat": ("95.0% of the groups", edit_metrics(lambda i, line: {"group/flat_share": 0.95})),
    "mismatch": (
        "mean difference came to 40 times its tolerance 1e-05",
        edit_metrics(lambda i, line: {"mismatch/mean": 4e-4 if i == 9 else 1e-7}),
    ),
    "excluded": (
        "unavailable 20.00%, invalid 0.",
        edit_metrics(lambda i, line: {"sample/unavailable_share": 0.2 * (i >= 36)}),
    ),
    "canary": ("moved by up to 0.7", edit_metrics(lambda i, line: {"canary/drift": 0.7 if i == 20 else 0.0})),
    "duplicates": ("100% of those", edit_metrics(lambda i, line: {"sample/duplicate_share": 0.97})),
    "blank": ("1 at the end, 0 in the training pictures", edit_pictures(lambda i, prompt: png(""))),
    "across": ("1 at the end", edit_pictures(lambda i, prompt: png("AMBER"))),
    "edges": ("0 at the end", edit_pictures(smooth)),
    "colours": ("times the training pictures'", edit_pictures(noise)),
    "kl": ("3 nats a token", edit_metrics(lambda i, line: {"kl": 3.0})),
    "clip": ("50.0% of the tokens", edit_metrics(lambda i, line: {"clip_fraction": 0.5})),
    "ess": ("lowest 0.05", edit_metrics(lambda i, line: {"ess": 0.05 if i == 7 else 0.9})),
    "grad": ("times the median", edit_metrics(lambda i, line: {"grad_norm": 90.0 if i == 7 else 0.5})),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "good")


def test_a_good_run_has_every_check_and_all_are_ok(good: Path) -> None:
    found = of_run(good)
    assert {name: check.status for name, check in checks_of(found).items()} == dict.fromkeys(BAD, "ok")
    assert set(BAD) == set(RULES) - {"cold_end"}  # which is part of sharpening
    assert found.counts == {"bad": 0, "look": 0, "ok": len(BAD)} and found.bad == ()
    assert [part.missing for part in found.parts] == [(), ()]
    assert [figure.title for figure in found.parts[1].others] == ["Loss", "Learning rate"]


PICTURES = ("blank", "across", "edges", "colours")


@pytest.fixture(scope="module")
def ill(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Health]:
    """By each of `PICTURES`: a run with such pictures. The one with blank pictures has every other fault as well."""
    found = {}
    for pictures in PICTURES:
        folder = build_run(tmp_path_factory.mktemp("runs") / pictures)
        for name in [pictures] + [name for name in BAD if pictures == "blank" and name not in PICTURES]:
            BAD[name][1](folder)
        found[pictures] = of_run(folder)
    return found


@pytest.mark.parametrize("name", BAD)
def test_what_is_made_bad_is_called_bad(ill: Mapping[str, Health], name: str) -> None:
    found = ill[name if name in PICTURES else "blank"]
    check = checks_of(found)[name]
    assert check.status == "bad", check.says
    assert BAD[name][0] in check.says
    assert any(check is bad for _, bad in found.bad)


def test_no_other_check_is_bad(ill: Mapping[str, Health]) -> None:
    bad = {pictures: {check.name for _, check in ill[pictures].bad} for pictures in PICTURES}
    assert bad.pop("blank") == set(BAD)
    assert bad == {
        "across": {"across", "duplicates"},
        "edges": {"edges", "duplicates"},
        "colours": {"edges", "colours"},
    }
    for part in (part for found in ill.values() for part in found.parts):
        ranks = [("bad", "look", "ok").index(check.status) for check in part.checks]
        assert ranks == sorted(ranks)


def test_the_page_says_what_is_bad_by_which_rule(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    for name in ("blank", "sharpening"):
        BAD[name][1](folder)
    page = write_report(folder).read_text()
    assert '<a href="#health-eval-sharpening">Sharpening or learning</a> (held-out evaluation)' in page
    assert '<figure class="plot card check" id="stage-03-grpo-blank">' in page
    assert "Share of blank pictures beyond the reference&#39;s: look from 0.02 up, bad from 0.1 up." in page
    assert "sharpened (bad)" in page
    assert page.count('class="status bad"') >= 2


def test_a_rule_states_its_direction() -> None:
    up, down = Rule("x", 0.5, 0.9, "And so."), Rule("y", 0.5, 0.2)
    assert [up.status(v) for v in (0.0, 0.49, 0.5, 0.89, 0.9, math.nan)] == ["ok", "ok", "look", "look", "bad", "bad"]
    assert [down.status(v) for v in (1.0, 0.51, 0.5, 0.21, 0.2, math.nan)] == ["ok", "ok", "look", "look", "bad", "bad"]
    assert up.text == "x: look from 0.5 up, bad from 0.9 up. And so."
    assert down.text == "y: look from 0.5 down, bad from 0.2 down."
    assert Rule("z", 1.0, math.inf).text == "z: look from 1 up."
    assert worst("ok", "look", "ok") == "look" and worst("look", "bad") == "bad" and worst() == "ok"
    assert factor(2, 1) == factor(1, 2) == 2 and factor(0, 0) == 1 and factor(0, 1) == math.inf


def test_verdicts_on_gains(good: Path) -> None:
    evaluation = read_run(good).stages[-1].evaluation
    assert evaluation is not None

    def verdict(at_one: tuple[float, float, float], at_best: tuple[float, float, float]) -> tuple[str, str]:
        changed = {"1.0": at_one, "best": at_best}
        kept = [c for c in evaluation.contrasts if c.at in changed and c.baseline == "sft"]
        contrasts = tuple(
            c.model_copy(update=dict(zip(("difference", "low", "high"), changed[c.at or ""], strict=True)))
            for c in kept
        )
        (pair,) = pairs(Evaluation(evaluation.rows, contrasts, ()), ROLES, ["grpo"])
        assert pair.best.judge == "tesseract"
        return pair.verdict, pair.status

    gain, none, loss = (0.2, 0.1, 0.3), (0.02, -0.05, 0.09), (-0.2, -0.3, -0.1)
    assert verdict(gain, gain) == ("learned", "ok")
    assert verdict(gain, none) == ("sharpened", "bad")
    assert verdict((0.9, 0.8, 1.0), gain) == ("learned", "look")  # less than a quarter of it is left
    assert verdict(none, none) == ("no gain shown", "look")
    assert verdict(none, gain) == ("learned", "ok")
    assert verdict(gain, loss) == verdict(none, loss) == ("worse", "bad")


def test_a_baseline_that_still_rises_at_its_coldest_wants_a_look(good: Path) -> None:
    evaluation = read_run(good).stages[-1].evaluation
    assert evaluation is not None
    steeper = tuple(
        row.model_copy(update={"mean": row.mean - 0.3}) if row.arm == "sft" and row.temperature > 0.4 else row
        for row in evaluation.rows
    )
    found = {pair.baseline: pair for pair in pairs(Evaluation(steeper, evaluation.contrasts, ()), ROLES, ["grpo"])}
    assert found["sft"].status == "look" and found["sft-more"].status == "ok"
    assert (found["sft"].cold_end or 0) > 1 > (found["sft-more"].cold_end or 1)


JUDGE: Line = {"judge": "tesseract", "metric": "exact"}


def gain(at: str, arm_at: float, baseline_at: float, difference: float, half: float) -> Contrast:
    interval = {"difference": difference, "low": difference - half, "high": difference + half}
    cell = {"arm": "grpo", "baseline": "sft", "at": at, "arm_temperature": arm_at, "baseline_temperature": baseline_at}
    return Contrast.model_validate(JUDGE | interval | cell)


def colder() -> Evaluation:
    """A gain of 0.4 at T = 1 and 0.1 at best, where the baseline rose by 0.03 to its coldest temperature."""
    means = {"sft": {1.0: 0.2, 0.5: 0.47, 0.25: 0.5}, "grpo": {1.0: 0.6, 0.5: 0.6, 0.25: 0.2}}
    cells = [{"arm": arm, "temperature": t, "mean": m} for arm, row in means.items() for t, m in row.items()]
    rows = [EvalRow.model_validate(JUDGE | cell | {"low": 0.1, "high": 0.9}) for cell in cells]
    rows += [row.model_copy(update={"judge": "ocr", "mean": 0.99}) for row in rows]
    contrasts = (
        gain("1.0", 1.0, 1.0, 0.4, 0.1),
        gain("0.5", 0.5, 0.5, 0.13, 0.1),
        gain("0.25", 0.25, 0.25, 0.7, 0.8),  # the largest, and not shown
        gain("other", 1.0, 0.5, 0.9, 0.1),  # of unequal temperatures
        gain("best", 0.5, 0.25, 0.1, 0.05),
    )
    return Evaluation(tuple(rows), contrasts, ())


def test_what_is_left_of_a_gain_is_a_share_of_the_largest_that_is_shown() -> None:
    (pair,) = pairs(colder(), ROLES, ["grpo"])
    assert (pair.kept, pair.cold_end) == (pytest.approx(0.1 / 0.4), pytest.approx(0.03 / 0.1))
    assert (pair.verdict, pair.status) == ("learned", "look")
    found = sharpening_check(colder(), ROLES, ["grpo"], "x")
    assert found is not None and found.table is not None
    assert found.table.head == ("arms", "both at T = 1", "both at T = 0.5", "both at T = 0.25", *found.table.head[4:])
    assert found.table.rows == (
        (
            "grpo − sft",
            "+0.400\n[+0.300, +0.500]",
            "+0.130\n[+0.030, +0.230]",
            "+0.700\n[−0.100, +1.500]",
            "+0.100\n[+0.050, +0.150]\nT = 0.5 against 0.25",
            "learned",
        ),
    )
    assert found.table.marked == {(0, 5): "look"}


def test_a_gain_at_best_that_is_not_shown_leaves_nothing() -> None:
    sharper = [c if c.at != "best" else gain("best", 0.5, 0.25, 0.1, 0.2) for c in colder().contrasts]
    (pair,) = pairs(Evaluation(colder().rows, tuple(sharper), ()), ROLES, ["grpo"])
    assert (pair.kept, pair.verdict, pair.status) == (0.0, "sharpened", "bad")


def test_a_baseline_that_is_best_above_its_coldest_has_no_rise_left() -> None:
    best = gain("best", 0.5, 0.5, 0.1, 0.05)
    (pair,) = pairs(Evaluation(colder().rows, (*colder().contrasts[:4], best), ()), ROLES, ["grpo"])
    assert pair.cold_end is None


def test_no_gain_at_all_has_no_share() -> None:
    best = gain("best", 0.5, 0.25, 0.0, 0.05)
    (pair,) = pairs(Evaluation(colder().rows, (*colder().contrasts[:4], best), ()), ROLES, ["grpo"])
    assert (pair.kept, pair.cold_end, pair.verdict) == (0.0, None, "sharpened")


def test_the_frontier_is_the_judges_scores_by_diversity_or_else_by_temperature() -> None:
    plain = sharpening_check(colder(), ROLES, ["grpo"], "x")
    assert plain is not None and "sft: 0.20 at 1.00 (T=1), 0.47 at 0.50 (T=0.5)" in plain.figure.plot.alt
    spread = tuple(Diversity(arm="sft", temperature=t, value=t * 0.6) for t in (1.0, 0.5))
    found = sharpening_check(Evaluation(colder().rows, colder().contrasts, spread), ROLES, ["grpo"], "x")
    assert found is not None and found.figure.plot.alt == (
        "exact by tesseract by diversity of the samples of one prompt. sft: 0.20 at 0.60 (T=1), 0.47 at 0.30 (T=0.5)."
    )


def across_and_up(line: Line2D) -> tuple[list[float], list[float]]:
    """The points of a drawn line, as x and y."""
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def drawn_plots(monkeypatch: pytest.MonkeyPatch) -> list[Drawing]:
    """Figures of the plots that are made from now on."""
    drawings: list[Drawing] = []
    monkeypatch.setattr("rlmm.report.plots.inline_svg", lambda figure, *_: drawings.append(figure) or Markup(""))
    return drawings


def test_a_score_on_the_frontier_has_the_interval_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = drawn_plots(monkeypatch)
    sharpening_check(colder(), ROLES, ["grpo"], "x")
    (axes,) = drawings[0].axes
    intervals = [across_and_up(line)[1] for line in axes.lines if len(across_and_up(line)[0]) == 2]
    assert intervals == [[0.1, 0.9]] * 6


def test_a_frontier_is_drawn_in_the_order_of_x_with_each_points_own_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = drawn_plots(monkeypatch)
    points = [
        FrontierPoint(0.5, 0.4, "b", 0.3, 0.6),
        FrontierPoint(0.9, 0.2, "c"),
        FrontierPoint(0.1, 0.7, "a", 0.6, 0.9),
    ]
    plot = frontier_plot("x", {"one": [], "two": points}, x_label="across", y_label="up")
    (axes,) = drawings[0].axes
    path, *intervals = [line for line in axes.lines if len(across_and_up(line)[0]) and line.get_marker() == "None"]
    assert across_and_up(path) == ([0.1, 0.5, 0.9], [0.7, 0.4, 0.2])
    assert [across_and_up(line) for line in intervals] == [
        ([0.1, 0.1], [0.6, 0.9]),
        ([0.5, 0.5], [0.3, 0.6]),
    ]
    assert {text.get_text(): text.xy for text in axes.texts if isinstance(text, Annotation)} == {
        "a": (0.1, 0.7),
        "b": (0.5, 0.4),
        "c": (0.9, 0.2),
    }
    assert (axes.get_xlabel(), axes.get_title(loc="left")) == ("across", "up")
    assert plot.legend == (("one", 0), ("two", 1))


def test_the_ends_of_a_curve_are_its_first_and_last_tenth() -> None:
    assert tenths(Curve(tuple(range(20)), tuple(map(float, range(1, 21))))) == (1.5, 19.5)
    assert tenths(Curve((1, 2, 3), (5.0, math.nan, 7.0))) == (5.0, 7.0)
    assert tenths(Curve((1,), (math.nan,))) is None


def test_learners_are_compared_with_the_other_arms_only(good: Path) -> None:
    evaluation = read_run(good).stages[-1].evaluation
    assert evaluation is not None
    more = tuple(
        c.model_copy(update={"arm": "grpo-lora", "baseline": b}) for c in evaluation.contrasts for b in ("sft", "grpo")
    )
    both = Evaluation(evaluation.rows, (*evaluation.contrasts, *more), ())
    names = [(pair.arm, pair.baseline) for pair in pairs(both, ROLES, ["grpo", "grpo-lora"])]
    assert names == [("grpo", "sft"), ("grpo", "sft-more"), ("grpo-lora", "sft")]
    assert len(pairs(both, ROLES, [])) == 4  # where nothing learned from rewards, every pair
    assert pairs(Evaluation(evaluation.rows, evaluation.contrasts[:1], ()), ROLES, []) == []


def test_an_arm_that_draws_blanks_when_cold_is_bad_though_its_rollouts_are_not(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    path = folder / "stages/04-eval/samples.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    cold = [r | {"image": png("")} if (r["arm"], r["temperature"]) == ("grpo", 0.4) else r for r in rows]
    write_parquet(path, cold)
    found = of_run(folder)
    assert checks_of(found)["blank"].status == "bad"
    assert "held-out samples at T = 0.4: 1" in checks_of(found)["blank"].says
    table = found.parts[0].table
    assert table is not None and [row[0] for row in table.rows][-2:] == ["grpo, T = 0.4", "training pictures"]
    assert table.marked == {(8, column): "bad" for column in (1, 2, 3, 4)}


def test_without_training_pictures_the_first_rollouts_are_the_reference(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    (folder / "stages/04-eval/reference.parquet").unlink()
    check = checks_of(of_run(folder))["edges"]
    assert "times the first rollouts'" in check.says and check.status == "ok"
    assert ("first rollouts", 0) in check.figure.plot.legend
    edit_pictures(noise, "03-grpo/rollouts/step-000039.parquet")(folder)
    assert checks_of(of_run(folder))["edges"].status == "bad"


def test_first_rollouts_have_the_first_value_of_every_guard_but_repeats() -> None:
    keys = ("guard/blank", "guard/edges", "guard/repeats")
    reference = first_rollouts({key: Curve((1, 41, 79), (0.2, 0.5, 0.9)) for key in keys})
    assert reference is not None and reference.figures == {"guard/blank": 0.2, "guard/edges": 0.2}
    assert first_rollouts({"reward/mean": Curve((1,), (0.2,))}) is None


def test_a_run_without_pictures_or_held_out_judge_says_what_is_not_measured(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", finished=False)
    for path in (folder / "stages/03-grpo/rollouts").iterdir():
        path.unlink()
    log = folder / "stages/03-grpo/metrics.jsonl"
    log.write_text(log.read_text().replace("held_out/", "elsewhere/"))
    (part,) = of_run(folder).parts
    assert part.missing[0] == "trained against held-out judge"
    assert part.missing[-4:] == ("blank pictures", "one picture for many prompts", "edge density", "colour entropy")
    assert "Not measured: trained against held-out judge, blank" in write_report(folder).read_text()


def reading(name: CheckName, curves: Mapping[str, list[float]], limits: Mapping[str, float] | None = None) -> float:
    """The value of a check of curves over the steps 1, 2, ..."""
    made = {key: Curve(tuple(range(1, len(values) + 1)), tuple(values)) for key, values in curves.items()}
    found = measured(name, made, limits or {})
    assert found is not None
    return found.value


def test_the_figure_nearest_its_tolerance_or_past_it_is_the_mismatch() -> None:
    limits = {"mismatch/mean": 1e-5, "mismatch/max": 1e-2}
    both = {"mismatch/mean": [1e-6, 3e-6, 2e-6], "mismatch/max": [1e-3, 9e-3, 1e-3]}
    assert reading("mismatch", both, limits) == pytest.approx(0.9)
    assert reading("mismatch", both, {"mismatch/mean": 1e-5}) == pytest.approx(0.3)
    broken = {"mismatch/mean": [1e-6, math.nan], "mismatch/max": [1e-3, 2e-2]}
    assert math.isnan(reading("mismatch", broken, limits))  # which a rule calls bad


def test_what_had_no_score_is_the_larger_of_the_whole_stage_and_its_end() -> None:
    early, late = [0.2] * 10 + [0.0] * 10, [0.0] * 18 + [0.2] * 2
    assert reading("excluded", {"sample/unavailable_share": early}) == pytest.approx(0.1)
    both = {"sample/unavailable_share": late, "sample/invalid_share": [0.05] * 20}
    assert reading("excluded", both) == pytest.approx(0.2)


def test_gradients_are_held_against_their_median() -> None:
    assert reading("grad", {"grad_norm": [1.0] * 4 + [30.0]}) == 30.0
    assert reading("grad", {"grad_norm": [1.0, math.nan, 1.0]}) == math.inf
    assert reading("grad", {"grad_norm": [0.0, 0.0, 5.0]}) == math.inf  # nothing is learned


def test_of_two_figures_of_one_thing_the_worse_is_judged() -> None:
    assert reading("duplicates", {"sample/duplicate_share": [0.1], "guard/repeats": [0.9]}) == 0.9
    assert reading("duplicates", {"sample/duplicate_share": [0.9], "guard/repeats": [0.1]}) == 0.9
    assert reading("kl", {"kl": [0.1], "approx_kl": [0.4]}) == 0.4
    assert reading("entropy", {"entropy": [2.0] * 4 + [9.0] * 32 + [0.5] * 4}) == 0.25


FIGURE = Figure("t", "c", Plot(Markup(""), (), ""))


def test_a_gate_that_was_passed_is_bad_whatever_the_figure() -> None:
    assert judged("flat", Reading(0.1, ""), FIGURE).status == "ok"
    assert judged("flat", Reading(0.1, ""), replace(FIGURE, alarm="above the gate")).status == "bad"


def test_the_judges_status_is_that_of_the_worst_from_nine_steps_on() -> None:
    steps = tuple(range(30))
    rise, fall = (Curve(steps, tuple(slope * s for s in steps)) for slope in (0.1, -0.1))
    found = judges_check(rise, {"a": rise, "b": fall}, FIGURE)
    assert found is not None and found.status == "bad" and "b: r = −1.00 over 30 steps, and it fell" in found.says
    nine = judges_check(rise, {"a": Curve(steps[:9], rise.values[:9])}, FIGURE)
    assert nine is not None and nine.status == "ok"


def test_what_an_arm_that_learned_nothing_draws_is_not_held_against_the_one_that_did(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")

    def collapse(content: dict[str, Any]) -> None:
        content["diversity"] = [r | {"value": 0.01} if r["arm"] == "sft-more" else r for r in content["diversity"]]

    edit_evaluation(collapse)(folder)
    path = folder / "stages/04-eval/samples.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    write_parquet(path, [r | {"image": png("")} if r["arm"] == "sft-more" else r for r in rows])
    found = checks_of(of_run(folder))
    assert found["arm_diversity"].status == found["blank"].status == "ok"


def test_held_out_samples_make_a_guard_worse_and_never_better(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    BAD["blank"][1](folder)
    path = folder / "stages/04-eval/samples.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    first = next(i for i, row in enumerate(rows) if (row["arm"], row["temperature"]) == ("grpo", 0.4))
    rows[first]["image"] = png("")
    write_parquet(path, rows)
    check = checks_of(of_run(folder))["blank"]
    assert check.status == "bad" and "held-out samples at T = 0.4: 0.0417" in check.says  # 1 of 24: a look


def test_an_evaluation_without_diversity_says_so(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    edit_evaluation(lambda content: content["diversity"].clear())(folder)
    assert of_run(folder).parts[0].missing == ("diversity of the arms",)


def test_correlation_is_over_the_steps_that_both_have() -> None:
    one = Curve((1, 2, 3, 4, 5), (1.0, 2.0, math.nan, 4.0, 5.0))
    other = Curve((2, 3, 4, 5, 6), (-2.0, 0.0, -4.0, -5.0, 9.0))
    assert correlation(one, other) == (pytest.approx(-1.0), 3)
    assert math.isnan(correlation(one, Curve((1, 2), (3.0, 3.0)))[0])


def test_judges_that_do_not_move_together_want_a_look_only_if_the_reward_rose() -> None:
    steps, figure = tuple(range(30)), FIGURE
    rise = Curve(steps, tuple(0.1 * s for s in steps))
    wave = Curve(steps, tuple((-1.0) ** s for s in steps))
    found = judges_check(rise, {"a": wave, "b": rise}, figure)
    assert found is not None and found.status == "look" and "b: r = 1.00 over 30 steps" in found.says
    level = judges_check(Curve(steps, tuple(math.sin(7 * s) for s in steps)), {"a": wave}, figure)
    assert level is not None and level.status == "ok" and "did not rise" in level.says
    assert judges_check(rise, {"a": Curve(steps[:8], rise.values[:8])}, figure) is None


def test_guards_follow_the_steps_and_take_whole_groups(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    stage, notes = read_run(folder).stages[2], Notes()
    curves = rollout_guards(stage, 2, notes)
    assert curves["guard/blank"].steps == (1, 41, 79) and notes.messages == []
    assert updates_per_rollout(read_run(folder).config, "grpo") == 2
    assert updates_per_rollout(None, "grpo") == updates_per_rollout({"stages": {}}, "grpo") == 1
    cells = arm_guards(folder / "stages/04-eval/samples.parquet", notes)
    assert [(cell.arm, cell.temperature) for cell in cells][:2] == [("sft", 1.0), ("sft", 0.7)] and len(cells) == 9
    reference = reference_of(read_run(folder))
    assert reference is not None and reference.name == "training pictures" and "guard/repeats" not in reference.figures


def test_a_codec_that_blurs_is_allowed_for_and_one_that_blanks_is_not(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    path = folder / "stages/04-eval/reference.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    write_parquet(path, [r | {"image": png("")} if r["kind"].endswith("codec") else r for r in rows])
    reference = reference_of(read_run(folder))
    assert reference is not None
    assert reference.figures["guard/edges"] == reference.figures["guard/colours"] == 0.0
    assert reference.figures["guard/blank"] == reference.figures["guard/across"] == 0.0


def test_figures_of_pictures_by_hand() -> None:
    word, blank = (Image.open(BytesIO(png(text))) for text in ("RIVER", ""))
    found = figures([word, word, blank, blank], ["a", "a", "b", "c"], ["p", "p", "q", "r"])
    assert found["guard/blank"] == 0.5 and found["guard/repeats"] == 1.0
    assert found["guard/across"] == pytest.approx(1 / 5)  # blank q and r, of the pairs pq pq pr pr qr
    assert set(figures([word], ["a"], ["p"])) == {"guard/blank", "guard/edges", "guard/colours"}
    assert figures([], [], []) == {}


def test_pictures_that_do_not_decode_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"arm": "a", "temperature": 1.0, "prompt": w, "image": png(w)[: 60 if i else None]} for i, w in enumerate(WORDS)
    ]
    write_parquet(tmp_path / "samples.parquet", rows)
    (cell,) = arm_guards(tmp_path / "samples.parquet", Notes())
    assert set(cell.figures) == {"guard/blank", "guard/edges", "guard/colours"}


def test_steps_are_spread_and_each_is_read_once() -> None:
    paths = [Path(f"step-{i:06d}.rank{rank}.parquet") for i in range(3) for rank in range(2)]
    assert [path.stem for path in one_a_step(paths)] == [f"step-{i:06d}.rank0" for i in range(3)]
    many = [Path(str(i)) for i in range(100)]
    chosen = spread(many, 24)
    assert len(set(chosen)) == 24 and chosen[0] == many[0] and chosen[-1] == many[-1]
    assert spread(many[:3], 24) == many[:3]
