"""The size of the images that a checkpoint draws where a recipe says nothing, and Emu3 Stage1 as EARL uses it."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from transformers.models.emu3.processing_emu3 import Emu3Processor

from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.families.base import Checkpoint
from rlmm.policies.families.emu3 import own_side
from rlmm.policies.families.loading import layout_of
from rollouts.contract import Layout
from tests.families.checkpoints import facts, tiny

STATED = facts("emu3")["config"]
AREAS = {name: STATED[f"{name}_image_area"] for name in ("gen", "chat", "stage1")} | {"earl": STATED["earl_image_area"]}
POSITIONS = {name: STATED[f"{name}_max_position_embeddings"] for name in ("gen", "stage1")}


def changed(folder: Path, name: str, **config: Any) -> Path:
    """The tiny checkpoint with a configuration that says something else."""
    folder.mkdir(exist_ok=True)
    for file in Path(tiny(name).path).iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    stated = json.loads((Path(tiny(name).path) / "config.json").read_text())
    if name == "emu3":
        config |= {"vocabulary_map": {}}  # which nothing here reads, and which takes a second
    (folder / "config.json").write_text(json.dumps(stated | config))
    return folder


def layout(folder: Path, name: str, **options: Any) -> Layout:
    return layout_of(folder, CheckpointPolicy(path=str(folder), family=name, **options))


def own(folder: Path) -> int:
    """Of an Emu3, in pixels."""
    return own_side(Checkpoint(str(folder), CheckpointPolicy(path=str(folder))), STATED["vq_spatial_factor"])


@pytest.mark.parametrize("name", AREAS)
def test_emu3_draws_the_area_that_its_configuration_states(name: str, tmp_path: Path) -> None:
    step, side = STATED["vq_spatial_factor"], own(changed(tmp_path, "emu3", image_area=AREAS[name]))
    codes = side // step
    processor = cast(Any, Emu3Processor)
    assert processor.calculate_generate_size(processor, "1:1", AREAS[name], step) == (codes, codes)
    assert side**2 == AREAS[name] and f"{side}x{side} -> {codes}*{codes}" in STATED["image_grid_rule"]


def test_the_area_may_stand_in_the_preprocessors_file(tmp_path: Path) -> None:
    folder = changed(tmp_path, "emu3")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_area": 65536, "min_pixels": 262144}))
    assert own(folder) == 256
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 262144}))
    assert own(folder) == 512  # the tiny model has too few positions for 90 x 90


@pytest.mark.parametrize("name", POSITIONS)
def test_without_an_area_the_positions_tell_gen_from_stage1(name: str, tmp_path: Path) -> None:
    """transformers' converter writes them beside the language model's own, which stay at the class default."""
    folder = changed(tmp_path, "emu3", max_position_embeddings=POSITIONS[name])
    assert own(folder) ** 2 == AREAS[name]


@pytest.mark.parametrize(("size", "side"), [(None, 64), ((256, 256), 32)])
def test_stage1_is_written_as_earl_writes_it(size: tuple[int, int] | None, side: int, tmp_path: Path) -> None:
    folder = changed(tmp_path, "emu3", image_area=AREAS["stage1"], max_position_embeddings=POSITIONS["stage1"])
    made, templates = layout(folder, "emu3", image_size=size), facts("emu3")["templates"]
    tokenizer = Checkpoint(str(folder), tiny("emu3")).tokenizer
    first, forced, placed = made.image[0], made.grid.forced(), iter(range(side * side))
    source = [forced[place] if place in forced else first + next(placed) for place in range(made.grid.length)]
    prompt = Checkpoint(str(folder), tiny("emu3")).spelled(made, "make it red")
    found = "".join(tokenizer.convert_ids_to_tokens(list(made.prefix(prompt, [source]))))
    rows = [
        "".join(f"<|visual token {row * side + col:06d}|>" for col in range(side)) + "<|extra_200|>"
        for row in range(side)
    ]
    image = f"<|image start|>{side}*{side}<|image token|>{''.join(rows)}<|extra_201|><|image end|>"
    prefilled = templates["earl_edit_rl_prefill"].format(source_image=image, prompt="make it red")
    assert found == prefilled + f"{side}*{side}<|image token|>"  # which theirs leaves to the policy


def test_stage1_is_guided_by_the_prompt_that_its_authors_publish_for_it_and_by_none_if_asked(tmp_path: Path) -> None:
    folder = changed(tmp_path, "emu3", image_area=AREAS["stage1"])
    assert "Emu3-Stage1" in STATED["negative_prompt_of"]
    negative = Checkpoint(str(folder), tiny("emu3")).text_ids(STATED["negative_prompt"])
    assert layout(folder, "emu3").null_prompt == negative
    assert layout(folder, "emu3", null_prompt="").null_prompt == ()


def test_the_others_draw_their_published_sizes(tmp_path: Path) -> None:
    anole = facts("anole")["config"]
    wide = json.loads((Path(tiny("chameleon").path) / "config.json").read_text())["vq_config"]
    folder = changed(tmp_path / "anole", "chameleon", vq_config=wide | {"resolution": anole["vq_resolution"]})
    made = layout(folder, "chameleon")
    assert [made.grid.rows, made.grid.cols] == anole["image_grid"]
    lumina = layout(Path(tiny("lumina_mgpt").path), "lumina_mgpt")
    stated = facts("lumina_mgpt")
    assert lumina.boi[1:] == (stated["tokens"]["size_24"],) * 2
    assert lumina.grid.length == stated["config"]["image_body_length_768"] + 1
    simplear = layout(Path(tiny("simplear").path), "simplear")
    assert [simplear.grid.rows, simplear.grid.cols] == facts("simplear")["config"]["image_grid"]
