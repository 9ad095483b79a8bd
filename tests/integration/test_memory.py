"""The memory plan follows what decides memory, and reads a checkpoint's size from its configuration."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlmm.bench import scale_problem
from rlmm.bench.scale import ScalePlan, bench_scale
from rlmm.bench.scale_child import update
from rlmm.bench.scale_problem import Point
from rlmm.bench.step import StepPlan, measure
from rlmm.bench.step_problem import Side, StepProblem, build_policy
from rlmm.config.policy import CheckpointPolicy, Lora
from rlmm.config.recipe import read_recipe
from rlmm.dry_run import Held, Live, Update, dry_run
from rlmm.memory import MemoryPlan, memory_plans
from rlmm.policies.tokenizer import character_tokenizer
from rlmm.policies.transformer import TransformerPolicy
from rlmm.sharing import LIBRARIES, libraries, read_sharing
from rollouts.law import Law
from tests.integration.conftest import TINY, TinyRun


def plan(*overrides: str) -> MemoryPlan:
    return memory_plans(read_recipe(TINY, list(overrides)))[-1]


@pytest.mark.long
def test_each_setting_moves_its_own_figure() -> None:
    plain = plan()
    assert plan("stages.grpo.gradient_checkpointing=true").working < plain.working
    three = plan("stages.grpo.sampling.source_scale=2.0")
    assert 1.3 < three.working / plain.working < 1.6  # three streams for two
    vllm = plan("stages.grpo.engine={kind: vllm, kv_megabytes: 64}")
    assert vllm.sampling == (64 << 20) - vllm.gradients
    assert vllm.engine == plain.engine == plan("stages.grpo.lora=null").weights
    assert plan("stages.grpo.precision=bfloat16").engine == plain.engine * 3 // 2
    whole = plan("stages.grpo.lora=null", "stages.grpo.weight_decay=0.1")
    rows = plan("stages.grpo.lora=null")  # without decay the head's rows of text are not trained
    assert whole.gradients - rows.gradients == len(character_tokenizer(())) * 32 * 4
    assert whole.reference == whole.weights == whole.gradients and plain.reference == 0 < plain.gradients
    assert plain.weights == whole.weights + plain.gradients
    for one in (plain, whole, rows):  # two moments and a count of steps
        assert 0 < one.optimizer - 2 * one.gradients < 400
    ahead = plan("stages.grpo.max_staleness=1", "stages.grpo.objective.mismatch={kind: truncate}")
    assert ahead.engine == plain.engine + plain.gradients  # the adapter that rollouts are drawn with
    assert ahead.total - plain.total == plain.gradients + plain.sampling + plain.gradients  # sampled during updates
    halved = plan("stages.grpo.precision=bfloat16", "stages.grpo.engine={kind: vllm, kv_megabytes: 64}")
    assert 2 * halved.engine == plain.engine
    servers = "stages.grpo.engine={kind: vllm_server, replicas: 3, dtype: bfloat16}"
    assert 2 * plan(servers).engine == 3 * plain.engine
    folding = plan("stages.grpo.engine={kind: vllm_server, sync: adapter}")
    assert folding.engine == plain.engine + plain.weights
    parallel = plan("stages.grpo.engine={kind: vllm_server, sync: adapter, tensor_parallel: 2}")
    assert parallel.engine == plain.engine + 2 * plain.weights
    elsewhere = "stages.grpo.engine={kind: vllm_server, urls: ['http://127.0.0.1:1']}"
    assert plan(elsewhere).engine == 0


def test_weights_in_parts_are_whole_while_one_draws_that_has_no_copy_of_them() -> None:
    def planned(path: Path, *overrides: str) -> MemoryPlan:
        return memory_plans(read_recipe(path, list(overrides)), processes=2)[-1]

    zero3 = "stages.grpo.deepspeed=configs/deepspeed/zero3.json"
    for path in (TINY, TINY.with_name("tiny_masked.yaml")):
        alone, parts = planned(path), planned(path, zero3)
        weights = 2 * parts.weights
        gathered = parts.exchange - read_sharing("configs/deepspeed/zero3.json", 2, 32).bucket
        assert weights == pytest.approx(alone.weights, abs=1) and gathered == alone.weights
        masked = path != TINY
        # In place of gradients and of what an update gathers: keys and values, and where there is no copy the weights.
        held = alone.sampling + alone.gradients + masked * alone.weights - parts.gradients - gathered
        assert parts.sampling == max(0, held)
    assert masked and parts.sampling > 0


def test_several_processes_of_cpus_hold_the_whole_head(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = "stages.grpo.lora=null"
    recipe, text = read_recipe(TINY, [settings]), len(character_tokenizer(())) * 32 * 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one, two = plan(settings), memory_plans(recipe, 2)[-1]
    assert two.gradients - one.gradients == text and two.optimizer - one.optimizer == 2 * text
    assert two.exchange == two.gradients
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert memory_plans(recipe, 2)[-1].gradients == one.gradients


def test_what_sampling_holds_by_hand() -> None:
    grpo = plan()
    position = 2 * 2 * 32 * 4  # keys and values of 2 layers of width 32
    # 8 rows of 12 codes and 17 tokens of prompt, with and without the prompt, of 2 prompts; one layer is gathered.
    cache, prompts, gathered = (8 * 2) * 29 * position, (2 * 2) * 17 * position, (8 * 2) * 17 * position // 4
    # Logits and what a draw makes of them are the rest.
    assert grpo.sampling + grpo.gradients == pytest.approx(cache + prompts + gathered, rel=0.03)
    sft = memory_plans(read_recipe(TINY, []))[0]
    assert sft.stage == "sft" and sft.engine == sft.reference == 0 < sft.gradients == sft.weights


def test_the_total_takes_the_larger_of_sampling_and_updating() -> None:
    held = {"weights": 1, "gradients": 20, "optimizer": 300, "reference": 4_000, "engine": 50_000}
    assert MemoryPlan("grpo", **held, working=700_000, sampling=699_999).total == 754_321
    assert MemoryPlan("grpo", **held, working=700_000, sampling=800_000, libraries=6_000_000).total == 6_854_321


def test_a_cpu_holds_libraries_beside_a_stage_and_a_gpus_memory_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan().libraries == LIBRARIES > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert plan().libraries == 0


def test_storages_count_from_when_they_are_made_to_when_nothing_refers_to_them() -> None:
    with FakeTensorMode(), Live() as live:
        first = torch.zeros(1 << 20)
        view, again = first[5:], first.add_(1)
        assert live.live == live.peak == 4 << 20
        second = first + 1
        del first, view
        assert (live.live, live.peak) == (8 << 20, 8 << 20)
        del again
        assert (live.live, live.peak) == (4 << 20, 8 << 20)
        del second
        assert live.live == 0


def test_what_is_left_out_and_what_is_not_named_does_not_count() -> None:
    with FakeTensorMode(), Live() as live:
        live.left_out = {"some": 1 << 20, "all": 0}
        first = torch.zeros(1 << 20)
        live.left_out = {"some": 3 << 20}
        second = torch.zeros(1 << 19)
        live.left_out.clear()
        del first, second
        third = torch.zeros(1 << 21)
    assert (live.most, live.peak) == ({"some": 3 << 20, "all": 4 << 20}, 8 << 20)
    del third


def test_activations_are_what_is_neither_state_nor_gradients() -> None:
    """An update of one row holds gradients and moments and little else; of many rows each holds the same again."""

    def held(rows: int, again: bool = False) -> Held:
        problem = StepProblem("plan", vocabulary=4096, codes=2048)
        update = Update(rows, 1, 64, 32, again, "float32", False, image_rows=True)
        return dry_run(lambda: build_policy(problem), Law(problem.layout.image, mode="none"), update)

    one, four, twice = held(1), held(4), held(1, again=True)
    assert four.activations == pytest.approx(4 * one.activations, rel=0.2)
    assert one.activations <= one.passing <= one.activations + one.gradients
    # In the second of two micro-batches the gradients of the first are there from the beginning.
    assert twice.passing == twice.activations + twice.gradients and twice.activations == one.activations
    assert four.peak == four.passing + four.optimizer


@pytest.mark.parametrize(("rows", "lora"), [(2, True), (4, False)])
def test_what_an_update_allocates_is_what_is_planned(rows: int, lora: bool) -> None:
    """At any size; of what is resident beside it, libraries' own buffers are tens of MiB."""
    point = Point(rows=rows, tokens=64, lora=lora)
    _, planned = scale_problem.planned(point, None)
    policy = scale_problem.make_policy(point)
    with Live() as live:
        update(point, policy, 2, None)
    planned -= libraries()
    assert 12 << 20 < planned < 100 << 20
    assert planned == pytest.approx(live.peak, rel=0.02)


@pytest.mark.long
@pytest.mark.parametrize(("rows", "tokens", "lora"), [(2, 256, True), (2, 256, False), (8, 256, True), (1, 64, False)])
def test_what_a_fresh_process_holds_is_what_is_planned(rows: int, tokens: int, lora: bool) -> None:
    """As any run on a CPU makes it: first use of libraries included, tensors padded."""
    plan = ScalePlan(Point(rows=rows, tokens=tokens, drawn=4, lora=lora), {}, steps=2)
    (row,) = bench_scale(plan, None, None)
    assert row.planned > 69 << 20 and row.after_rollout is not None and row.after_rollout > 32 << 20
    assert row.planned == pytest.approx(row.peak, rel=0.15)


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dry_run_holds_what_the_trainer_does(
    lora: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 15 %, at a size where tensors and not libraries are what is held. Memory that is let go of is given back,
    or the peak of what is resident would be that of the allocator's store."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    problem = StepProblem("plan", vocabulary=4096, codes=2048, prompts=4, samples=8 if checkpointing else 2)
    side = Side("rlmm", lora=lora, checkpointing=checkpointing)
    (measured,) = measure(StepPlan((problem,), (side,), repeats=1, steps=2), lambda line: None)

    def make() -> TransformerPolicy:
        policy = build_policy(problem)
        if lora:
            policy.add_lora(Lora(), seed=0)
        return policy

    length = problem.prompt_tokens + problem.image_tokens
    update = Update(problem.rows, 1, length, problem.image_tokens, False, "float32", checkpointing, image_rows=True)
    planned = dry_run(make, Law(problem.layout.image, mode="none"), update).peak
    assert planned > 200 << 20
    assert planned == pytest.approx(measured.peak, rel=0.15)


def test_a_checkpoint_has_the_plan_of_the_policy_it_holds(tiny_run: TinyRun) -> None:
    folder = tiny_run.folder.stage("sft") / "model"
    same = tiny_run.recipe.model_copy(update={"policy": CheckpointPolicy(path=str(folder))})
    assert memory_plans(same) == memory_plans(tiny_run.recipe)


def test_a_checkpoint_that_is_not_there_is_named(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe.model_copy(update={"policy": CheckpointPolicy(path=str(tmp_path))})
    with pytest.raises(ValueError, match="layout.json"):
        memory_plans(recipe)
