"""The report: what it reads, what it says, and that one page holds everything."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlmm.report import write_report
from rlmm.report.comparison import scores
from rlmm.report.data import read_metrics, read_run
from rlmm.report.findings import _unbeaten, divergence, headline, judge_roles, tone
from rlmm.report.galleries import comparisons, first_middle_last, groups
from rlmm.report.images import picture
from rlmm.report.page import batch_equations
from rlmm.report.plots import Line, line_plot, smoothed
from rlmm.report.records import Contrast, Curve, EvalRow, Evaluation, Notes
from rlmm.report.timing import bars, duration
from tests.synthetic_run import ARMS, WORDS, build_run, png, write_parquet, write_samples


class Page(HTMLParser):
    """The tags with their attributes, and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._quiet = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._quiet = tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        self.text += "" if self._quiet else data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page(write_report(finished).read_text())


def test_page_holds_everything_itself(page: Page) -> None:
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    galleries = 3 * 12 * len(ARMS) + 3 * (3 * 8 - 1)
    assert len(images) == galleries + 1  # the samples, the groups (one image is not stored), the codec's grid
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), f"<{tag} {name}={value[:60]}>"
        assert tag not in ("link", "iframe", "object", "embed")
    assert not re.search(r"@import|url\((?!#)", page.text)


def test_every_image_and_plot_has_an_alternative_text(page: Page) -> None:
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    plots = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(plots) > 20
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in plots)


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [value for _, a in page.tags for name in ("href", "xlink:href") if (value := a.get(name))]
    assert {target.removeprefix("#") for target in targets} <= set(ids)


def test_headline_names_the_held_out_judge_and_its_interval(page: Page) -> None:
    assert "grpo does better than sft by tesseract, a judge it was never trained on" in page.text
    assert page.text.index("+0.230") < page.text.index("Before and after")
    assert "[+0.170, +0.290]" in page.text
    assert "16 prompts × 8 samples = 128 rollouts a step = 2 updates × 64 rollouts" in page.text
    assert "Not there yet" not in page.text


def test_the_headline_says_which_rival_its_winner_does_not_beat() -> None:
    def contrast(arm: str, baseline: str, difference: float, judge: str = "tesseract") -> Contrast:
        low, high = difference - 0.03, difference + 0.03
        given = {"arm": arm, "baseline": baseline, "judge": judge, "metric": "exact", "at": "best"}
        return Contrast.model_validate(given | {"difference": difference, "low": low, "high": high})

    won, level = contrast("grpo", "sft", 0.05), contrast("grpo", "sft_more", -0.01)
    assert _unbeaten(won, [won, level]) == " It is not shown to be better than sft_more (−0.010 [−0.040, +0.020])."
    assert _unbeaten(won, [won, contrast("grpo", "sft_more", 0.04)]) == ""
    assert _unbeaten(won, [won, contrast("sft_more", "sft", 0.01), contrast("grpo", "sft_more", 0, "ocr")]) == ""
    assert _unbeaten(level, [won, level]) == ""


def test_running_run_shows_what_there_is(tmp_path: Path) -> None:
    page = Page(write_report(build_run(tmp_path / "going", finished=False)).read_text())
    assert "Not evaluated on held-out prompts yet. Over the 40 steps of grpo" in page.text
    assert "the last line is torn (it was being written); 1 line left out" in page.text
    assert page.text.count("Not there yet") == 2  # samples and evaluation


def test_empty_run_and_wrong_folder(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    assert Page(write_report(tmp_path).read_text()).text.count("Not there yet") >= 8
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"neither config.yaml nor stages/ \(found: notes.txt\)"):
        write_report(tmp_path / "other")


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    attack = '<script>alert(1)</script><img src="https://example.org/x.png" onerror="alert(2)">'
    write_samples(folder / "stages/04-eval/samples.parquet", [attack])
    content = json.loads((folder / "stages/04-eval/eval.json").read_text())
    content["rows"][0]["arm"] = "</svg><script>alert(3)</script>$x_"
    (folder / "stages/04-eval/eval.json").write_text(json.dumps(content))
    page = Page(write_report(folder).read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not any("example.org" in (a.get("src") or "") for _, a in page.tags)
    assert attack in page.text


def test_metrics_of_one_step_are_merged_and_broken_lines_counted(tmp_path: Path) -> None:
    lines = ['{"step": 2, "a": 1.0}', "not json", '{"step": 1, "a": 5, "b": null}', '{"a": 3}']
    lines += ['{"step": 2, "a": 4.0, "c": NaN}', '{"step": 3, "a": 7, "d": "text"}', '{"step": 4, "a']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    notes = Notes()
    curves = read_metrics(tmp_path / "metrics.jsonl", notes)
    assert curves["a"] == Curve((1, 2, 3), (5.0, 4.0, 7.0))
    assert math.isnan(curves["c"].values[0])
    assert set(curves) == {"a", "c"}
    assert "the last line is torn" in notes.messages[0]
    assert "2 line(s) left out, not an object with a step: 2, 4" in notes.messages[1]


def test_broken_parts_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    stage = folder / "stages" / "04-eval"
    content = json.loads((stage / "eval.json").read_text())
    del content["rows"][0]["mean"]
    content["contrasts"][0]["low"] = math.nan
    (stage / "eval.json").write_text(json.dumps(content))
    (stage / "samples.parquet").write_bytes(b"PAR1 torn")
    (folder / "environment.json").write_text("{")
    (folder / "stages" / "03-grpo" / "rollouts" / "step-000000.parquet").unlink()
    write_parquet(folder / "stages/03-grpo/rollouts/step-000000.parquet", [{"prompt": "x", "reward": 1.0}])
    (folder / "stages" / "01-codec" / "reconstruction.png").write_bytes(png("torn")[:60])
    text = Page(write_report(folder).read_text()).text
    for expected in (
        "rows[0] left out: mean: Field required",
        "samples.parquet is not a readable parquet file",
        "environment.json is not JSON",
        "no column group_id (it has prompt, reward)",
        "reconstruction.png cannot be read",
    ):
        assert expected in text
    assert "no interval" in text


def test_samples_pair_the_arms_by_prompt_and_seed(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples.parquet")
    found = comparisons(tmp_path / "samples.parquet", Notes())
    assert list(found) == [1.0, 0.7, 0.4]
    for rows in found.values():
        assert [row.prompt for row in rows] == [f'render "{word}"' for word in WORDS]
        assert all(row.seed == 0 and [s.arm for s in row.samples] == list(ARMS) for row in rows)


def test_an_edit_is_shown_beside_its_source_and_a_text_above_its_image(tmp_path: Path) -> None:
    row = {"arm": "sft", "temperature": 1.0, "seed": 0, "image": png("X")}
    told = [row | {"prompt": "edit", "source": png("Y"), "text": "red"}, row | {"prompt": "plain", "source": None}]
    write_parquet(tmp_path / "samples.parquet", told)
    edit, plain = comparisons(tmp_path / "samples.parquet", Notes())[1.0]
    assert edit.source is not None and edit.source.width and edit.samples[0].wrote == "red"
    assert plain.source is None and plain.samples[0].wrote == ""


def test_arms_are_shown_at_the_same_seed_whatever_the_order_of_rows(tmp_path: Path) -> None:
    pairs = (("a", 5), ("a", 6), ("b", 6), ("b", 5))
    rows = [
        {"arm": arm, "temperature": 1.0, "seed": seed, "prompt": "p", "image": png("X"), "score/j": float(seed)}
        for arm, seed in pairs
    ]
    write_parquet(tmp_path / "samples.parquet", rows)
    (row,) = comparisons(tmp_path / "samples.parquet", Notes())[1.0]
    assert [sample.verdicts[0].score for sample in row.samples] == [5.0, 5.0]


def test_broken_and_absent_images_leave_a_reason(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "group_id": "g", "reward": 0.5, "advantage": -1.0, "image": b"broken"},
        {"prompt": "p", "group_id": "g", "reward": None, "advantage": None, "image": None},
        {"prompt": "p", "group_id": "g", "reward": 0.9, "advantage": 1.0, "image": png("OK")},
    ]
    write_parquet(tmp_path / "step-000003.parquet", rows)
    notes = Notes()
    step, (group,) = groups(tmp_path / "step-000003.parquet", notes)
    assert step is None
    assert [member.advantage for member in group.members] == [1.0, -1.0, None]
    assert [member.why_missing for member in group.members] == [
        "",
        "image cannot be read",
        "image not stored",
    ]
    assert group.members[2].status == "unavailable"
    assert "1 shown image(s) cannot be read" in notes.messages[0]


def test_large_images_are_shrunk_and_small_ones_kept_exact() -> None:
    small, large = picture(png("A"), "a"), picture(png("A", (1024, 256)), "a")
    assert small and (small.width, small.height, small.pixelated) == (96, 32, True)
    assert small.uri.startswith("data:image/png")
    assert large and (large.width, large.height, large.pixelated) == (512, 128, False)
    assert picture(png("A")[:90], "a") is None and picture(b"", "a") is None and picture(None, "a") is None


def test_verdict_follows_the_interval() -> None:
    def contrast(low: float | None, high: float | None) -> Contrast:
        return Contrast(arm="a", baseline="b", judge="j", metric="m", difference=0.0, low=low, high=high)

    pairs = ((0.01, 0.2), (-0.2, -0.01), (-0.1, 0.1), (None, None), (0.0, 0.1))
    assert [tone(contrast(*pair)) for pair in pairs] == ["better", "worse", "open", "open", "open"]


def test_headline_prefers_each_arm_at_its_best(finished: Path) -> None:
    run = read_run(finished)
    evaluation = run.stages[-1].evaluation
    assert evaluation is not None
    changed = {"difference": -2e-5, "low": -0.1, "high": 0.1}
    held_out = [c for c in evaluation.contrasts if (c.judge, c.baseline) == ("tesseract", "sft-more")]
    contrasts = tuple(c.model_copy(update=changed) if c.at == "best" else c for c in held_out)
    assert contrasts[0].at == "1.0"
    told = headline(run, Evaluation(evaluation.rows, contrasts, ()), run.stages[2:3])
    assert "no difference between grpo and sft-more is shown" in told.sentence and told.tone == "open"
    assert (told.findings[0].difference, told.findings[0].interval) == ("−2.0e-05", "[−0.100, +0.100]")
    assert "each at its best temperature" in told.findings[0].detail


def test_headline_prefers_the_held_out_judge(finished: Path) -> None:
    run = read_run(finished)
    evaluation = run.stages[-1].evaluation
    assert evaluation is not None and evaluation.contrasts[0].judge == "ocr"
    assert judge_roles(run.stages) == {"ocr": "trained on", "tesseract": "held out"}
    rewards = {"terms": [{"name": "ocr", "label": None}]}
    other = {"rewards": rewards, "held_out": {"terms": [{"name": "ocr", "label": "tesseract"}]}}
    assert judge_roles(run.stages, other)["tesseract"] == "trained on"
    own = {"rewards": rewards, "held_out": {"terms": [{"name": "tesseract", "label": "tesseract"}]}}
    assert judge_roles(run.stages, own)["tesseract"] == "held out"
    assert judge_roles([], {**other, "stages": {"pairs": {"kind": "pairs"}}}) == dict.fromkeys(
        ("ocr", "tesseract"), "trained on"
    )
    self_play = {"kind": "pairs", "judge": {"rewards": {"terms": [{"function": "own.py:spelling"}]}}}
    roles = judge_roles([], {**other, "stages": {"sft": {"kind": "sft"}, "pairs": self_play}})
    assert roles == {"spelling": "trained on", "tesseract": "held out"}
    assert "by tesseract" in headline(run, evaluation, run.stages[2:3]).sentence
    assert (
        "ocr, the very judge"
        in headline(run, Evaluation(evaluation.rows, evaluation.contrasts[:2], ()), run.stages[2:3]).sentence
    )


def test_divergence_is_seen_and_noise_is_not() -> None:
    rng = random.Random(0)
    steps = tuple(range(60))

    def curve(values: list[float]) -> Curve:
        return Curve(steps, tuple(value + rng.gauss(0, 0.02) for value in values))

    rise = curve([0.5 + 0.005 * step for step in steps])
    fall = curve([0.5 - 0.003 * step for step in steps])
    turn = curve([0.3 + 0.2 * math.sin(math.pi * step / 59) for step in steps])
    flat = curve([0.4] * 60)
    assert divergence(rise, fall) and divergence(rise, turn)
    assert not divergence(rise, rise) and not divergence(rise, flat)
    assert not divergence(flat, fall) and not divergence(fall, fall)
    assert not divergence(rise, Curve((0, 1), (1.0, 0.0)))


def test_smoothing_keeps_straight_lines_and_bridges_gaps() -> None:
    steps = tuple(range(0, 40, 2))
    values = [0.3 * step - 1 for step in steps]
    gaps = [math.nan if 3 < index < 6 else value for index, value in enumerate(values)]
    assert smoothed(Curve(steps, tuple(gaps)), 4).values == pytest.approx(values)
    constant_noise = smoothed(Curve(steps, tuple((-1.0) ** index for index in range(20))), 6).values
    assert max(map(abs, constant_noise[3:-3])) < 0.2


def test_plot_is_free_of_fixed_colours_and_foreign_ids() -> None:
    curve = Curve(tuple(range(30)), tuple(0.1 * step for step in range(30)))
    plot = line_plot("my-key", [Line("a & b", curve, 1, curve), Line("c", curve, 2, ceiling=2.0)], y_label="<y>")
    assert not re.search(r"#[0-9a-f]{6}", plot.svg)
    assert "var(--series-1)" in plot.svg and "var(--grid)" in plot.svg
    assert all(found.startswith("my-key-") for found in re.findall(r'\bid="([^"]*)"', plot.svg))
    assert "<style" not in plot.svg and "&lt;y&gt;" in plot.svg
    assert plot.legend == (("a & b", 1), ("c", 2))
    assert "a & b: 0.1 to 2.8" in plot.alt


def test_evaluation_table_by_arm_and_temperature() -> None:
    def row(arm: str, temperature: float, mean: float) -> EvalRow:
        return EvalRow(arm=arm, temperature=temperature, judge="j", metric="m", mean=mean, n_prompts=8, n_seeds=1)

    evaluation = Evaluation((row("a", 1.0, 0.2), row("a", 0.5, 0.4), row("b", 1.0, 0.3)), (), ())
    (score,) = scores(evaluation, {}, "k")
    assert score.temperatures == (1.0, 0.5)
    table = {arm: [cell and (cell.mean, cell.best) for cell in cells] for arm, cells in score.table}
    assert table == {"a": [("0.200", False), ("0.400", True)], "b": [("0.300", True), None]}
    assert score.basis == "8 prompts, 1 sampling seed each, 0 samples excluded."


def test_gates_come_from_the_config_and_are_reported_when_passed(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    assert read_run(folder).stages[2].gates == {"mismatch/mean": 1e-5, "group/flat_share": 0.98}
    with (folder / "stages/03-grpo/metrics.jsonl").open("a") as handle:
        handle.write('{"step": 41, "mismatch/mean": 0.01}\n')
    text = Page(write_report(folder).read_text()).text
    assert "mean: above the gate of 1e-05 at 1 step(s), first 41." in text


def test_time_adds_up(finished: Path) -> None:
    by_stage = {bar.stage: bar for bar in bars(read_run(finished).stages)}
    sft = {segment.kind: segment.seconds for segment in by_stage["sft"].segments}
    assert sum(sft.values()) == pytest.approx(90.0)
    assert [segment.kind for segment in by_stage["eval"].segments] == ["other"]
    assert max(sum(s.share for s in bar.segments) for bar in by_stage.values()) == pytest.approx(1.0)
    assert [duration(s) for s in (4.2, 42, 200, 7500)] == ["4.2 s", "42 s", "3 min 20 s", "2 h 05 min"]


def test_first_middle_last_and_equations() -> None:
    paths = [Path(str(index)) for index in range(7)]
    assert first_middle_last(paths) == [("First", paths[0]), ("Middle", paths[3]), ("Last", paths[6])]
    assert first_middle_last(paths[:1]) == [("First", paths[0])] and first_middle_last([]) == []
    assert batch_equations(None) == [] and batch_equations({"stages": {"sft": {"batch_size": 3}}}) == []
