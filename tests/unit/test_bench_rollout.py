"""`rlmm bench rollout` and the doctor's choice of threads: figures that follow from what was timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rlmm.bench import rollout as bench
from rlmm.bench.machine import ProductStep, Shape, Timing
from rlmm.bench.rollout import RolloutPlan, measure
from rlmm.bench.rollout_problem import PROMPT, Case, Problem
from rlmm.bench.threads import check_thread_choice, measured_apart
from rlmm.cli import app


def test_the_command_writes_every_figure_and_its_setting(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "rollout.json"
    sizes = ["--sizes", "tiny", "--samples", "4", "--tokens", "4", "--repeats", "2"]
    done = CliRunner().invoke(app, ["bench", "rollout", *sizes, "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "Image tokens a second" in done.output
    record = json.loads(file.read_text())
    assert record["setting"]["threads"] == 1
    assert record["setting"]["packages"]["torch"] == torch.__version__
    assert {"cpu", "commit", "OMP_NUM_THREADS"} <= set(record["setting"])
    assert len(record["rows"]) == 4
    for row in record["rows"]:
        (engine,) = row["engines"].values()
        assert len(engine["timing"]["wall_s"]) == len(row["generate"]["wall_s"]) == 2
        assert engine["within_gate"]


def test_rates_and_ratios_follow_from_the_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([2.0, 12.0, 4.0, 8.0, 1.0, 9.0])
    monkeypatch.setattr(bench, "timed", lambda work: Timing((next(clock),), (1.0,)))
    monkeypatch.setattr(ProductStep, "measure", lambda self: Timing((0.25,), (0.25,)))
    case = Case("tiny", "float32", 1.0, samples=4, tokens=4)
    row = measure(case, ("torch",), 3, lambda: None)
    one = row.engines["torch"]
    assert one.timing.wall_s == (2.0, 4.0, 1.0)
    assert one.rate == 4 * 4 / 2.0
    assert row.generate_rate == 4 * 4 / 9.0
    assert one.ratio == 9.0 / 2.0
    assert row.limit_rate == 4 / 0.25
    assert one.share == pytest.approx(one.rate / row.limit_rate)
    assert one.mismatch_max < 1e-4


def test_an_adapter_is_measured_by_the_policy_that_has_it() -> None:
    problem = Problem(Case("tiny", "float32", 1.0, samples=4, tokens=8), ("torch", "torch-lora"))
    plain, adapted = problem.policies["torch"], problem.policies["torch-lora"]
    assert problem.mismatch("torch-lora").largest < 1e-4
    made = problem.sample("torch-lora")
    with torch.no_grad():
        apart = (plain.log_probs(made).logp_BS - adapted.log_probs(made).logp_BS).abs().max()
    assert float(apart) > 1e-3


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_both_ways_sample_the_same_work(scale: float) -> None:
    case = Case("tiny", "float32", scale, samples=4, tokens=5)
    problem = Problem(case)
    made = problem.sample()
    assert made.ids.shape == (4, 5)
    assert made.streams["cond"].ids_BP.shape == (4, PROMPT)
    assert set(made.streams) == ({"cond", "uncond"} if case.guided else {"cond"})
    assert made.group_id == ("0", "0", "2", "2")
    first, second, third, _ = made.streams["cond"].ids_BP.tolist()
    assert first == second != third
    generated = problem.generate()
    assert generated.shape == (4, PROMPT + 5)
    assert torch.equal(generated[:, :PROMPT], made.streams["cond"].ids_BP)


def test_the_limit_counts_every_product_of_a_step() -> None:
    guided, plain = (Problem(Case("tiny", "float32", scale, samples=4, tokens=4)) for scale in (3.0, 1.0))
    step = ProductStep(plain.product_shapes(), torch.device("cpu"))
    config, codes = plain.policy.base.config, 64
    hidden, inner = config.hidden_size, config.intermediate_size
    body = config.num_hidden_layers * (4 * hidden * hidden + 3 * hidden * inner)
    assert step.flops == 2 * 4 * (body + hidden * codes)
    assert sum(shape.flops for shape in guided.product_shapes()) == 2 * step.flops
    assert 0 < step.measure(at_least_s=0.0).wall < 10


def test_packed_and_plain_products_are_the_same_numbers() -> None:
    step = ProductStep([Shape(5, 32, 48, torch.float32, 2)], torch.device("cpu"))
    for (x, packed), (y, plain) in zip(step.steps["packed"], step.steps["plain"], strict=True):
        torch.testing.assert_close(packed(x), plain(y), rtol=1e-5, atol=1e-5)


def test_an_unknown_size_names_the_nearest_and_empty_plans_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'5M'.*5m"):
        RolloutPlan(("5M",))
    with pytest.raises(ValueError, match=r"no engine 'vlm'.*vllm"):
        RolloutPlan(("5m",), engines=("vlm",))
    with pytest.raises(ValueError, match="multiple of 2"):
        Problem(Case("tiny", "float32", 1.0, samples=3, tokens=4))
    with pytest.raises(ValueError, match="at least 1"):
        RolloutPlan(("5m",), repeats=0)


@pytest.mark.parametrize(
    ("seconds", "status", "word"),
    [
        ({1: 0.010, 2: 0.012}, "ok", "1 thread: 10.0 ms, 2 threads: 12.0 ms"),
        ({1: 0.010, 2: 0.009}, "ok", "1 by default"),
        ({1: 0.010, 2: 0.005}, "warn", "runtime.threads=2"),
        ("no torch", "warn", "not measured: no torch"),
    ],
)
def test_one_thread_unless_more_pay(seconds: dict[int, float] | str, status: str, word: str) -> None:
    check = check_thread_choice(seconds)
    assert check.status == status
    assert word in f"{check.found} {check.fix}"


def test_threads_are_measured_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured_apart(2, {})
    assert isinstance(found, dict), found
    assert set(found) == {1, 2}
    assert all(seconds > 0 for seconds in found.values())
    failed = subprocess.CompletedProcess([sys.executable], 1, "", "Traceback\nImportError: no torch here\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert measured_apart(2, {}) == "ImportError: no torch here"
