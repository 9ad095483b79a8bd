"""One point of `rlmm bench scale`, in processes of its own: `python -m rlmm.bench.scale_child ORDER RESULT`."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlmm.allocator import prepare
from rlmm.bench.machine import copied_bytes_a_second, timed
from rlmm.bench.scale_problem import (
    Point,
    bytes_a_step,
    engine_config,
    law,
    make_policy,
    micro_batches,
    planned,
    requests,
    stage,
    zero_file,
)
from rlmm.bench.step_child import Measure, reset_peak
from rlmm.bench.step_rlmm import FixedSource
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.engines import build_engine
from rlmm.train.grpo import grpo_loss, rows_alone
from rlmm.train.launch import processes
from rlmm.train.metrics import Meter, MetricsFile
from rlmm.train.processes import device, world
from rlmm.train.trainer import StageTrainer, training_arguments
from rollouts.contract import Grid
from rollouts.trajectory import Span
from rollouts.vllm_engine.engine import VllmEngine

WARM_UP = 4
"""Image tokens drawn before the rollout that is timed, and on a GPU trained on before the updates that are."""


def roll_out(point: Point, policy: TransformerPolicy) -> dict[str, float]:
    """Seconds of a rollout, and the bytes that one of its steps must read."""
    whole, asked, chosen = policy.layout, requests(point, policy), law(point, policy)
    engine = build_engine(engine_config(point, policy), policy, chosen)

    def draw(tokens: int) -> None:
        policy.layout = replace(whole, grid=Grid(1, tokens))
        if isinstance(engine, VllmEngine):  # which has a layout of its own
            engine.layout = policy.layout
        engine.generate(asked, [Span("image", chosen, tokens)])

    draw(min(WARM_UP, point.sampled))
    seconds = timed(lambda: draw(point.sampled)).wall
    policy.layout = whole
    engine.close()
    return {"rollout_s": seconds, "bytes_a_step": bytes_a_step(point, policy)}


def update(point: Point, policy: TransformerPolicy, steps: int, deepspeed: str | None) -> dict[str, Any]:
    """Seconds of each update, and bytes of its peak above the loaded policy."""
    config, measure = stage(point, steps, deepspeed), Measure()
    if rows_alone(config):
        policy.train_image_rows()
    batches = micro_batches(point, policy, config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            config,
            Path(folder),
            micro_batch_size=point.micro_rows,
            accumulation=len(batches),
            report_to=[],
            name="bench",
        )
        arguments.set_save("no")
        loaded = reset_peak()
        trainer = StageTrainer(
            policy.model,
            arguments,
            FixedSource(batches),
            lambda model, batch, meter: grpo_loss(policy, config, model, batch, meter),
            MetricsFile(Path(folder) / "metrics.jsonl"),
            Meter(),
            [measure],
        )
        trainer.train()
    return {"update_s": measure.seconds, "peak": measure.baseline + measure.peak - loaded}


def policy_here(point: Point) -> TransformerPolicy:
    """The point's policy, made where this process trains."""
    with device():
        return make_policy(point)


def held(point: Point, deepspeed: str | None) -> dict[str, Any]:
    """The bytes of a point's update alone, of this process. The second has the optimizer's state from its start."""
    return {"peak": update(point, policy_here(point), 2, deepspeed)["peak"]}


def measured(point: Point, steps: int, deepspeed: str | None) -> dict[str, Any]:
    """All figures of a point, of this process."""
    copied = copied_bytes_a_second()
    if torch.cuda.is_available():  # whose libraries' first use is in the memory that is planned, and no part of it
        small = replace(point, model="tiny", rows=point.processes, micro=0, tokens=WARM_UP, drawn=0)
        update(small, policy_here(small), 2, deepspeed)
    weights, beside = planned(point, deepspeed) if world()[0] == 0 else (None, None)
    policy = policy_here(point)
    policy.model.eval()
    parameters = sum(one.numel() for one in policy.base.parameters())
    figures = {"parameters": parameters, "planned": beside, "weights": weights, "gpu": torch.cuda.is_available()}
    with torch.no_grad():
        figures |= roll_out(point, policy) | {"copied_bytes_a_second": copied}
    return figures | update(point, policy, steps, deepspeed)


def main(order: Path, result: Path) -> None:
    given = json.loads(order.read_text())
    torch.set_num_threads(given["threads"])
    prepare(torch.cuda.is_available())
    point = Point(**given["point"])
    with processes(deepspeed=point.zero > 0), tempfile.TemporaryDirectory() as folder:
        file = zero_file(point, Path(folder))
        figures = held(point, file) if given["only_memory"] else measured(point, given["steps"], file)
        if world()[0] == 0:
            result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
