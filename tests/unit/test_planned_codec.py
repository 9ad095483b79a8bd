"""What an image tokenizer is planned to hold is what it holds."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from rlmm import planned_codec
from rlmm.codecs import Codec, empty_codec, save_codec
from rlmm.config.codec import FsqCodec, PretrainedCodec, VqCodec
from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import read_recipe
from rlmm.config.stages import DpoStage, GrpoStage, SftStage
from rlmm.dry_run import NO_DRY_RUN, Live
from rlmm.memory import MemoryPlan, memory_plans, plan_lines
from rlmm.planned_codec import UNDRAWN, codec_plan, decoding, encoding
from rlmm.planned_data import Read, Shown
from tests.families.checkpoints import SIZES, tiny
from tests.integration.planned import RECIPES

SMALL = FsqCodec(image_size=(64, 64), channels=3, patch=4, width=64, blocks=2, levels=(4, 4, 4))
OWN_VQ = VqCodec(image_size=(64, 64), channels=3, patch=4, width=64, blocks=2, codebook_size=64)
VQ = {"base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 1, "num_patches": 16}
JANUS = PretrainedCodec(network="janus", config=VQ, grid=(16, 16), image_size=(64, 64), num_codes=100)


@pytest.mark.parametrize("settings", [SMALL, OWN_VQ, JANUS], ids=["own", "vq", "janus"])
@pytest.mark.parametrize("at_once", [3, 100])
def test_pictures_and_codes(
    settings: FsqCodec | VqCodec | PretrainedCodec, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlmm.codecs.base.PIXELS_AT_ONCE", at_once * 64 * 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make = partial(empty_codec, settings)
    codec = make().eval()
    with torch.no_grad(), Live() as live:
        codec.decode(torch.zeros(8, codec.tokens, dtype=torch.long))
    assert decoding(make, 8) == pytest.approx(live.peak, rel=0.02)
    with torch.no_grad(), Live() as live:
        codec.encode(torch.zeros(8, 3, 64, 64))
    assert live.peak > 1 << 20
    assert encoding(make, 8) == pytest.approx(live.peak, rel=0.02)


def test_on_a_gpu_pictures_that_wait_are_not_in_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(empty_codec, SMALL)
    monkeypatch.setattr("rlmm.codecs.base.PIXELS_AT_ONCE", 64 * 64)
    found = {}
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        found[gpu] = encoding(make, 9)
    assert found[False] - found[True] == 8 * 3 * 64 * 64 * 4


WIDE = {"kind": "fsq", "levels": [4, 4, 4], "image_size": [128, 384], "channels": 1, "patch": 64, "width": 256}


def wide() -> Codec:
    return empty_codec(FsqCodec.model_validate(WIDE | {"blocks": 1}))


def plans(*overrides: str, recipe: str = "tiny.yaml") -> dict[str, MemoryPlan]:
    given = f"codec={WIDE | {'blocks': 1}}"
    return {one.stage: one for one in memory_plans(read_recipe(RECIPES / recipe, [given, *overrides]))}


@pytest.mark.parametrize("settings", [SMALL, JANUS], ids=["joined", "working"])  # what is widest at the end
def test_a_rollouts_further_pictures_add_themselves(
    settings: FsqCodec | PretrainedCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlmm.codecs.base.PIXELS_AT_ONCE", 2 * 64 * 64)
    make = partial(empty_codec, settings)
    codec = make().eval()
    with torch.no_grad(), Live() as live:
        codec.decode(torch.zeros(40, 256, dtype=torch.long))
    assert decoding(make, 40) >= decoding(make, 6) + 34 * 3 * 64 * 64 * 4
    assert decoding(make, 40) == pytest.approx(live.peak, rel=0.05)


def test_a_stage_holds_it_and_what_it_works_with() -> None:
    made, draws = plans("stages.grpo.lora=null"), decoding(wide, 8)
    weights = sum(one.nbytes for one in (*wide().parameters(), *wide().buffers()))
    assert made["sft"].codec == made["grpo"].codec == weights > 1 << 20
    assert replace(made["sft"], codec=0).total == made["sft"].total - weights
    sft, grpo = made["sft"], made["grpo"]
    # Codes are made before there are gradients and an optimizer: of the 48 pictures that there are.
    assert sft.pictures + sft.gradients + sft.optimizer == encoding(wide, 48) and sft.sampling == 0
    assert grpo.pictures + grpo.gradients == draws
    vllm = plans("stages.grpo.engine={kind: vllm, kv_megabytes: 64}")["grpo"]
    assert vllm.pictures == draws + (64 << 20) - vllm.gradients  # which stays reserved
    few = plans("stages.grpo.score_chunk=1")["grpo"]
    assert few.pictures == decoding(wide, 4) - few.gradients
    ahead = plans("stages.grpo.max_staleness=1", "stages.grpo.objective.mismatch={kind: truncate}")["grpo"]
    assert ahead.pictures == draws  # beside the gradients of the update that goes on meanwhile
    dear = replace(grpo, working=5 << 20, sampling=6 << 20, pictures=7 << 20)
    assert dear.total - replace(dear, pictures=0).total == 1 << 20
    both = replace(dear, at_once=True)
    assert both.total - dear.total == 5 << 20


def test_what_makes_no_picture_holds_none() -> None:
    words = read_recipe(RECIPES / "tiny_thought.yaml", ["stages.grpo.sampling={answer: {length_limit: 4}}"])
    plan, drawn = codec_plan(words), Read([Shown("a")] * 9)
    sft, grpo = words.stages["sft"], words.stages["grpo"]
    pairs = read_recipe(RECIPES / "tiny_pair_dpo.yaml", []).stages["dpo"]
    assert isinstance(sft, SftStage) and isinstance(grpo, GrpoStage) and isinstance(pairs, DpoStage) and plan.make
    assert plan.working(grpo, 1, drawn) == 0 < plan.working(sft, 1, drawn) == encoding(plan.make, 9)
    assert plan.working(sft, 1, Read([Shown("a", text="b", image=False), Shown("a", coded=True)])) == 0
    assert plan.working(sft, 1, Read([Shown("a", 3, "b", image=False)])) == encoding(plan.make, 3)
    assert plan.working(sft, 1, Read((), 0, "away")) == encoding(plan.make, 256)
    assert plan.working(pairs, 1, drawn) == 0
    loose = pairs.model_copy(update={"pairs": None})
    assert plan.working(loose, 1, Read([Shown("a")] * 900)) == encoding(plan.make, 2 * 256)


@pytest.mark.parametrize("name", [*SIZES, "show_o", "mmada", "lumina_dimoo"])
def test_of_a_checkpoint(name: str) -> None:
    recipe = read_recipe(RECIPES / "tiny.yaml", [])
    policy = CheckpointPolicy(path="none", family=name, tiny=True)
    plan = codec_plan(recipe.model_copy(update={"policy": policy, "codec": None}))
    held = planned_codec.checkpoint_codec(policy).state_dict()
    assert plan.weights >= sum(one.nbytes for one in held.values()) > 0
    loads = name in ("blip3o_next", "glm_image", "glm_image_edit")
    grpo, sft = recipe.stages["grpo"], recipe.stages["sft"]
    assert isinstance(grpo, GrpoStage) and isinstance(sft, SftStage)
    asks = name.startswith("glm_image")  # its encoder asks for values
    drawn, said = Read([Shown("a")] * 3), plan.notes(sft)
    assert len(said) == asks and plan.notes(grpo) == (*said, *[UNDRAWN] * loads)
    assert (plan.working(sft, 1, drawn) == 0) == asks and (plan.working(grpo, 1, drawn) == 0) == loads


def test_of_an_own_folder_no_weight_is_read(tmp_path: Path) -> None:
    save_codec(wide(), tmp_path / "codec")
    (tmp_path / "layout.json").write_text("{}")
    (tmp_path / "codec" / "codec.safetensors").write_bytes(b"")
    recipe = read_recipe(RECIPES / "tiny.yaml", [])
    plan = codec_plan(recipe.model_copy(update={"policy": CheckpointPolicy(path=str(tmp_path)), "codec": None}))
    assert plan.weights == plans()["sft"].codec and plan.make is not None


def test_what_is_not_counted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unlike(make: object, images: int) -> int:
        raise NO_DRY_RUN[0](torch.ops.aten.item.default)

    recipe = read_recipe(RECIPES / "tiny.yaml", [])
    monkeypatch.setattr(planned_codec, "decoding", unlike)
    assert plan_lines(recipe)[-1].startswith("of sft, grpo: making codes and pictures is not counted (")
    monkeypatch.undo()

    def lost(policy: object) -> None:
        raise ValueError("it lacks a weight")

    monkeypatch.setattr(planned_codec, "checkpoint_codec", lost)
    there = recipe.model_copy(update={"policy": tiny("janus"), "codec": None})
    assert codec_plan(there).uncounted == "the image tokenizer is not counted: it lacks a weight"
