"""`rlmm bench scale`: its plan, what a point is made of, the powers it finds, and one point measured."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes

from rlmm.bench import scale, scale_child, scale_problem
from rlmm.bench.scale import ScalePlan, ScaleRow, along, bench_scale, growth, run_point, scale_plan, table
from rlmm.bench.scale_child import held, measured
from rlmm.bench.scale_plot import write_plot
from rlmm.bench.scale_problem import Point, bytes_a_step, engine_config, make_policy, micro_batches, stage
from rlmm.config.engines import VllmEngineConfig
from rlmm.policies.transformer import TransformerPolicy
from rollouts.vllm_engine.host import BLOCK

LISTS = {"model": "tiny,quickstart", "rows": "8,2,32", "tokens": "16", "processes": "1,2", "zero": "0"}
FIXED = {"precision": "float32", "weights": "float32", "engine": "torch"}
BASE = Point("tiny", rows=8, tokens=16)


def row(point: Point, parameters: int = 100) -> ScaleRow:
    """Costs by powers: the update with rows to 1.5 and parameters to 0.5, its memory with tokens squared."""
    update_s = point.rows**1.5 * parameters**0.5
    return ScaleRow(
        point, parameters, point.tokens * 1.0, 1.0, 0.5, update_s, 1.0, point.tokens**2.0, 1.0, 1.0, 1.0, 1.0
    )


def test_one_axis_is_changed_at_a_time_from_the_first_of_each_list() -> None:
    plan = scale_plan(LISTS, FIXED, steps=2)
    assert plan.base == BASE
    rows = [replace(BASE, rows=2), replace(BASE, rows=32)]
    assert plan.points() == [BASE, replace(BASE, model="quickstart"), *rows, replace(BASE, processes=2)]


@pytest.mark.parametrize(
    ("lists", "fixed", "said"),
    [
        ({"model": "tinny"}, {}, "Nearest: tiny"),
        ({"rows": "8,x"}, {}, "--rows '8,x' must be whole numbers"),
        ({}, {"precision": "float16"}, "one of float32, bfloat16"),
        ({}, {"engine": "vlm"}, "one of torch, vllm, vllm-compiled"),
        ({}, {"engine": "vllm"}, "inside a single process, and the point has 2"),
        ({"processes": "3"}, {}, "do not come out even"),
        ({}, {"micro": 3}, "do not come out even"),
        ({"zero": "0,4"}, {}, "zero 4: it is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(lists: dict[str, str], fixed: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scale_plan(LISTS | lists, FIXED | fixed).points()


@pytest.mark.parametrize(("rows", "drawn"), [(2, 4), (8, 4), (8, 0)])
def test_vllm_has_room_for_every_row_and_for_the_longest_sample(rows: int, drawn: int) -> None:
    point = Point("quickstart", rows=rows, tokens=512, drawn=drawn, guidance_scale=2.0, engine="vllm")
    policy = make_policy(point)
    config = engine_config(point, policy)
    assert isinstance(config, VllmEngineConfig) and config.enforce_eager and config.max_rows == 2 * rows
    held = (config.kv_megabytes << 20) // scale_problem.position_bytes(policy, 4)
    longest = max(map(len, scale_problem.prefixes(policy).values())) + (drawn or 512)
    assert config.max_length == longest <= policy.sizes.max_position_embeddings and held >= longest + BLOCK
    assert held >= 2 * rows * (scale_problem.PROMPT + (drawn or 512)) + BLOCK
    compiled = engine_config(replace(point, engine="vllm-compiled"), policy)
    assert isinstance(compiled, VllmEngineConfig) and not compiled.enforce_eager
    assert engine_config(replace(point, engine="torch"), policy).kind == "torch"


def test_a_plot_of_nothing_that_grows_is_refused(tmp_path: Path) -> None:
    plan = scale_plan(LISTS | {"model": "tiny", "rows": "8", "processes": "1", "zero": "0,1"}, FIXED)
    with pytest.raises(ValueError, match="give one of rows, tokens, model, processes two values"):
        bench_scale(plan, None, tmp_path / "plot.png")


def test_powers_are_those_of_the_costs() -> None:
    axes = {"rows": (2, 32), "tokens": (64,), "model": ("quickstart",), "processes": (), "zero": (1,)}
    plan = ScalePlan(BASE, axes)
    rows = [row(point, 900 if point.model == "quickstart" else 100) for point in plan.points()]
    assert [one.point.rows for one in along(rows, plan, "rows")] == [2, 8, 32]
    found = growth(rows, plan)
    assert found["rows"] == pytest.approx({"rollout": 0, "update": 1.5, "update's memory": 0}, abs=1e-9)
    assert found["tokens"] == pytest.approx({"rollout": 1, "update": 0, "update's memory": 2}, abs=1e-9)
    assert found["model"]["update"] == pytest.approx(0.5)
    assert found.keys() == {"rows", "tokens", "model"}
    assert table(rows, 1).row_count == len(rows)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    plan = ScalePlan(BASE, {"rows": (2, 32), "processes": ()})
    rows = [asdict(row(point)) for point in plan.points()]
    write_plot(rows, plan.axes, asdict(plan.base), tmp_path / "plots" / "scale.png")
    assert (tmp_path / "plots" / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_what_processes_share_is_compared_with_an_even_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dotted: list[list[float]] = []
    drawn = Axes.plot

    def plot(self: Axes, x: Sequence[float], y: Sequence[float], style: str, **kwargs: Any) -> Any:
        dotted.extend([list(y)] if style == ":" else [])
        return drawn(self, x, y, style, **kwargs)

    monkeypatch.setattr(Axes, "plot", plot)
    points = {
        "processes": [BASE, replace(BASE, processes=2), replace(BASE, processes=4)],
        "rows": [BASE, replace(BASE, rows=16), replace(BASE, rows=32)],
    }
    for axis, along_it in points.items():
        rows = [asdict(row(point)) for point in along_it]
        write_plot(rows, {axis: [one["point"][axis] for one in rows[1:]]}, asdict(BASE), tmp_path / "scale.png")
    update = [dotted[1], dotted[5]]  # of each axis: rollout, update, and two of memory
    assert [[y / line[0] for y in line] for line in update] == [[1, 1 / 2, 1 / 4], [1, 2, 4]]


def test_a_decode_step_reads_the_body_the_heads_image_rows_and_the_cache() -> None:
    point = replace(BASE, rows=4, guidance_scale=2.0)
    policy = make_policy(point)
    layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32  # attention, gated MLP, norms
    cache = 2 * 4 * (2 * 2 * 32) * (len(scale_problem.prefixes(policy)["cond"]) + 16 / 2)
    assert bytes_a_step(point, policy) == 4 * (2 * layer + 32 + 64 * 32 + cache)


def test_processes_share_out_the_rows_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(point: Point, rank: int) -> list[tuple[str, ...]]:
        monkeypatch.setattr(scale_problem, "world", lambda: (rank, point.processes))
        found = micro_batches(point, make_policy(point), stage(point, 1))
        weights.append(float(sum(one.weight_BS.sum() for one in found)))
        return [one.trajectory.sample_id for one in found]

    weights: list[float] = []
    whole = parts(BASE, 0)
    shared = replace(BASE, processes=2, micro=2)
    both = [*parts(shared, 0), *parts(shared, 1)]
    assert [len(part) for part in both] == [2, 2, 2, 2] and sum(both, ()) == whole[0]
    assert weights[1] + weights[2] == pytest.approx(weights[0])


def test_a_point_is_measured() -> None:
    found = measured(replace(BASE, rows=2, lora=True, guidance_scale=2.0, drawn=8), steps=2, deepspeed=None)
    assert len(found["update_s"]) == 2 and min(found["update_s"]) > 0
    assert found["rollout_s"] > 0 and found["planned"] > 0 and found["weights"] == 4 * found["parameters"]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("gpu", [False, True])
def test_memory_of_an_update_alone_is_measured_apart_on_a_cpu(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def child(point: Point, plan: ScalePlan, *, only_memory: bool) -> dict[str, Any]:
        asked.append(only_memory)
        return {"peak": 5.0} if only_memory else {"peak": 9.0, "gpu": gpu}

    monkeypatch.setattr(scale, "_child", child)
    made = run_point(BASE, ScalePlan(BASE, {}))
    assert (made["peak"], made["after_rollout"]) == ((9.0, None) if gpu else (5.0, 9.0))
    assert asked == [False] if gpu else [False, True]


def test_what_is_held_is_of_two_updates_and_no_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second update has the optimizer's state from its start, as those after it do."""
    steps: list[int] = []

    def update(point: Point, policy: TransformerPolicy, count: int, deepspeed: str | None) -> dict[str, Any]:
        steps.append(count)
        return {"update_s": [1.0], "peak": 7.0}

    monkeypatch.setattr(scale_child, "update", update)
    monkeypatch.setattr(scale_child, "roll_out", lambda *_: pytest.fail("keys and values would be held, too"))
    assert held(BASE, None) == {"peak": 7.0} and steps == [2]
