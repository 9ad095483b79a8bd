"""Every stage that trains, under DeepSpeed's ZeRO on two processes: the steps and the weights of one process alone."""

import importlib.util
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rlmm.config.stages import SftStage
from rlmm.policies.families.loading import load_policy
from rlmm.space import outline, written
from rlmm.train.gates import TOLERANCE
from tests.integration.programs import ROOT
from tests.integration.zero_program import CASES, recipe_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
FOLDERS = {"more": "03-more", "adapter": "04-adapter", "whole": "05-whole"}
OTHERS = {
    "tied": ("03-more", "04-whole"),
    "thought": ("03-whole",),
    "masked": ("03-more", "04-adapter", "05-noise"),
    "dpo": ("04-adapter", "05-kto", "06-held", "07-whole", "08-taught"),
}
"""The other cases of the program, and their stages."""
STAGES = ("zero1", "zero2", "zero3")
RESUMED = ("zero1", "zero2", "zero3", "zero3_offload")
LONG = ("zero2_offload", "zero3_offload", *(f"{kind}+resumed" for kind in RESUMED))
EXACT = 2e-6


def start(folder: Path, case: str, *kinds: str) -> Path:
    command = [sys.executable, "-m", "tests.integration.zero_program", str(folder), case, *kinds]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run `plain`, and of one for each of ZeRO's stages."""
    return start(tmp_path_factory.mktemp("zero"), "tiny", "plain", *STAGES)


@pytest.fixture(scope="module")
def every(some: Path) -> Path:
    """The same, with the runs LONG."""
    return start(some, "tiny", *LONG)


def rows(folder: Path, kind: str, stage: str) -> list[dict[str, Any]]:
    path = folder / kind / "stages" / stage / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in found]


def weights(folder: Path, kind: str, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / kind / "stages" / stage / "model" / "model.safetensors")


def wrapped(folder: Path, kind: str) -> dict[str, list[Any]]:
    """Stage -> the class that its loss went through, and the stage of ZeRO."""
    return json.loads((folder / f"{kind}.wrapped.json").read_text())


def assert_resumed(folder: Path, kind: str, stages: int) -> None:
    """Every process went on from the checkpoint, in so many stages."""
    assert (folder / f"{kind}.log").read_text().count("resuming from step 2 of 4") == 2 * stages, kind


def assert_equal_to_one_process(folder: Path, kind: str, stage: str) -> None:
    assert wrapped(folder, "plain")[stage][1] is None
    if kind.startswith("zero"):
        assert wrapped(folder, kind)[stage] == ["DeepSpeedEngine", int(kind[4])]
    for one, two in zip(rows(folder, "plain", stage), rows(folder, kind, stage), strict=True):
        assert {name: two[name] for name in one} == pytest.approx(one, rel=1e-4, abs=EXACT)
    one, two = weights(folder, "plain", stage), weights(folder, kind, stage)
    before = load_file(folder / "plain" / "stages" / "02-sft" / "model" / "model.safetensors")
    assert one.keys() == two.keys()
    assert max(float((one[name] - before[name]).abs().max()) for name in one) > 1e-4
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=EXACT)


def test_weights_are_in_parts_between_the_modules_that_use_them(some: Path) -> None:
    alone, both = (json.loads((some / f"{kind}.json").read_text()) for kind in ("plain", "zero3"))
    # All of them at once only to save the results of the two stages before, and in no rollout.
    assert both == {"kind": "DeepSpeedEngine", "processes": 2, "there": 0, "whole": 2, "recomputes": False}
    assert alone["processes"] == 1 and alone["there"] > 10_000


@pytest.mark.parametrize("kind", STAGES)
def test_a_run_is_not_buried_in_warnings(kind: str, some: Path) -> None:
    assert "FutureWarning" not in (some / f"{kind}.log").read_text()


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("stage", FOLDERS.values())
def test_each_of_zeros_stages_takes_the_steps_of_one_process(stage: str, kind: str, some: Path) -> None:
    assert_equal_to_one_process(some, kind, stage)


def test_an_adapter_trained_in_parts_is_the_exported_model(some: Path) -> None:
    stages = some / "zero3" / "stages"
    policy = load_policy(stages / FOLDERS["adapter"] / "model")
    base = load_policy(stages / "02-sft" / "model")
    ids = torch.arange(5, 25).unsqueeze(0) % policy.layout.vocab_size
    with torch.no_grad():
        alone, merged = base.model(ids).logits, policy.model(ids).logits
        adapted = PeftModel.from_pretrained(base.model, str(stages / FOLDERS["adapter"] / "adapter"))(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-5)
    assert float((alone - merged).abs().max()) > 1e-4


@pytest.mark.long
@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("stage", FOLDERS.values())
def test_offloaded_or_resumed_it_takes_the_steps_of_one_process(stage: str, kind: str, every: Path) -> None:
    assert_equal_to_one_process(every, kind, stage)


@pytest.mark.long
@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("stage", FOLDERS.values())
def test_resumed_in_parts_is_bit_identical(stage: str, kind: str, every: Path) -> None:
    assert_resumed(every, f"{kind}+resumed", len(FOLDERS))
    assert rows(every, f"{kind}+resumed", stage) == rows(every, kind, stage)
    whole, resumed = weights(every, kind, stage), weights(every, f"{kind}+resumed", stage)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.long
@pytest.mark.parametrize("case", OTHERS)
def test_other_policies_and_losses_take_the_steps_of_one_process_in_parts(
    case: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = start(tmp_path_factory.mktemp(case), case, "plain", *STAGES, "zero3+resumed")
    assert_resumed(folder, "zero3+resumed", len(OTHERS[case]))
    for stage in OTHERS[case]:
        for kind in STAGES:
            assert_equal_to_one_process(folder, kind, stage)
        assert rows(folder, "zero3+resumed", stage) == rows(folder, "zero3", stage)
        whole, resumed = weights(folder, "zero3", stage), weights(folder, "zero3+resumed", stage)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), stage


@pytest.mark.long
@pytest.mark.parametrize("case", ["fsq", "vq", "lfq"])
def test_codecs_take_the_steps_of_one_process_in_parts(case: str, tmp_path: Path) -> None:
    resumed = f"{STAGES[-1]}+resumed"
    start(tmp_path, case, "plain", *STAGES, resumed)
    made = {
        kind: load_file(tmp_path / kind / "stages/01-codec/codec/codec.safetensors")
        for kind in ("plain", *STAGES, resumed)
    }
    assert_resumed(tmp_path, resumed, 1)
    for kind in STAGES:
        assert wrapped(tmp_path, kind) == {"01-codec": ["DeepSpeedEngine", int(kind[4])]}
        alone, both = (rows(tmp_path, name, "01-codec") for name in ("plain", kind))
        assert len(alone) == 4
        for one, two in zip(alone, both, strict=True):
            assert {name: two[name] for name in one} == pytest.approx(one, rel=1e-4, abs=EXACT), kind
        for name, weight in made["plain"].items():
            torch.testing.assert_close(made[kind][name], weight, rtol=0, atol=5e-5)  # Adam divides small by small
    assert rows(tmp_path, resumed, "01-codec") == rows(tmp_path, STAGES[-1], "01-codec")
    assert all(torch.equal(weight, made[STAGES[-1]][name]) for name, weight in made[resumed].items())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["two", "zero2", "zero3"])
def test_lost_in_every_phase_it_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    """`full`: a disk on which nothing fits, which both processes write to."""
    lost = [f"{kind}+{place}" for place in ("rollout", "scoring", "save", "full")]
    start(tmp_path, "deaths", "plain", kind, *lost)
    for name in lost:
        assert_resumed(tmp_path, name, 1 if name.endswith("full") else 2)
        for stage in ("03-adapter", "04-whole"):
            assert rows(tmp_path, name, stage) == rows(tmp_path, kind, stage), (name, stage)
            whole, resumed = weights(tmp_path, kind, stage), weights(tmp_path, name, stage)
            assert all(torch.equal(whole[one], resumed[one]) for one in whole), (name, stage)
    said = (tmp_path / f"{kind}+full.log").read_text()
    assert "mend the disk" in said
    assert f"error: a file of the stage: {tmp_path}/{kind}+full/stages/04-whole/checkpoints" in said


@pytest.mark.long
def test_recomputed_activations_change_no_gradient_of_two_processes(some: Path, tmp_path: Path) -> None:
    start(some, "tiny", "two")
    start(tmp_path, "recomputed", "plain", "two")
    seen = [json.loads((folder / "two.json").read_text()) for folder in (some, tmp_path)]
    assert [one["recomputes"] for one in seen] == [False, True]
    assert all((one["kind"], one["processes"]) == ("DistributedDataParallel", 2) for one in seen)
    for stage in FOLDERS.values():
        assert_equal_to_one_process(some, "two", stage)
        assert rows(tmp_path, "two", stage) == rows(some, "two", stage)
        kept, again = weights(some, "two", stage), weights(tmp_path, "two", stage)
        assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.long
def test_bfloat16_in_parts_takes_the_steps_of_one_process_to_its_rounding(tmp_path: Path) -> None:
    start(tmp_path, "bfloat16", "plain", "zero2", "zero3")
    for kind, stage in product(("zero2", "zero3"), FOLDERS.values()):
        alone, both = rows(tmp_path, "plain", stage), rows(tmp_path, kind, stage)
        for one, two in zip(alone, both, strict=True):
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.01), (kind, stage)
        found = [row["mismatch/mean"] for row in both if "mismatch/mean" in row]
        # Of the gate's rounding, and more than float32's: it was bfloat16.
        assert all(1e-5 < mean < TOLERANCE["bfloat16"] for mean in found) and bool(found) == (stage != "03-more")
        before = load_file(tmp_path / "plain" / "stages" / "02-sft" / "model" / "model.safetensors")
        one, two = weights(tmp_path, "plain", stage), weights(tmp_path, kind, stage)
        apart, moved = (sum(float((a[n] - one[n]).square().sum()) for n in one) for a in (two, before))
        # Adam steps by signs where gradients are small, and one token in a rollout may be another.
        assert apart < 0.2**2 * moved, (kind, stage)


@pytest.mark.long
def test_a_checkpoint_takes_the_room_that_is_planned(tmp_path: Path) -> None:
    start(tmp_path, "sizes", "plain", *STAGES)
    for kind in ("plain", *STAGES):
        recipe = recipe_of(tmp_path / kind, CASES["sizes"], kind)
        for name, folder in {"adapter": "03-adapter", "whole": "04-whole"}.items():
            stage = recipe.stages[name]
            assert isinstance(stage, SftStage)
            kept = tmp_path / kind / "stages" / folder / "checkpoints" / "checkpoint-4"
            found = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
            assert written(recipe, outline(recipe), stage).checkpoint == pytest.approx(found, rel=0.15), (kind, name)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_an_adapter_in_parts_sampled_by_a_server_and_resumed(tmp_path: Path) -> None:
    folder = start(tmp_path, "served", "plain", "zero3", "zero3+resumed")
    assert_equal_to_one_process(folder, "zero3", "03-adapter")
    assert_resumed(folder, "zero3+resumed", 1)
    assert rows(folder, "zero3+resumed", "03-adapter") == rows(folder, "zero3", "03-adapter")
    whole, resumed = (weights(folder, kind, "03-adapter") for kind in ("zero3", "zero3+resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
