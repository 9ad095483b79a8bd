"""`rlmm check` of every shipped recipe where no hub can be reached, and of checkpoints that are not here or broken."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from rlmm.cli import app
from rlmm.config.policy import NewPolicy
from rlmm.config.recipe import read_recipe
from rlmm.installation import recipes_dir
from tests.families.checkpoints import tiny
from tests.integration.conftest import TINY

RECIPES = sorted(path.stem for path in recipes_dir().glob("*.yaml"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_passes(name: str) -> None:
    answer, policy = check(name), read_recipe(Path(name)).policy
    assert answer.exit_code == 0, answer.output
    assert f"name: {name}" in answer.output
    if isinstance(policy, NewPolicy):
        assert "Memory plan" in answer.output and "no memory plan" not in answer.output
    else:
        assert f"no memory plan: {policy.path} is not here: there is no such folder" in answer.output


def test_what_would_bring_the_checkpoint_is_said() -> None:
    assert "the run in runs/earl_emu3_sft makes it" in check("earl_emu3_grpo").output
    assert "make the folder, or download it" in check("t2i_r1").output


def test_a_recipe_at_fault_fails_with_its_checkpoint_absent_too() -> None:
    answer = check("t2i_r1", "stages.grpo.stepz=3")
    assert answer.exit_code != 0 and "stepz" in str(answer.exception)


def test_a_deepspeed_file_that_no_stage_can_train_with_is_an_error_before_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text("{}")
    answer = check(str(TINY), f"stages.grpo.deepspeed={file}", "--nproc", "2")
    assert answer.exit_code != 0 and "asks for no ZeRO stage" in str(answer.exception)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_checkpoint_that_is_there_and_cannot_be_read_is_an_error(missing: str, tmp_path: Path) -> None:
    there = Path(tiny("janus").path)
    for file in there.iterdir():
        if file.name != missing:
            (tmp_path / file.name).symlink_to(file)
    answer = check("t2i_r1", f"policy.path={tmp_path}")
    assert answer.exit_code != 0 and "not a readable checkpoint" in str(answer.exception)
    assert "no memory plan" not in answer.output


def test_a_checkpoint_that_is_there_has_a_plan() -> None:
    answer = check("t2i_r1", f"policy.path={tiny('janus').path}", "stages.grpo.engine.max_length=512")
    assert answer.exit_code == 0 and "Memory plan" in answer.output and "no memory plan" not in answer.output
