"""Options of the GRPO stage in whole steps: flat groups replaced, the entropy bonus and its floor, token weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe, RecipeError
from rlmm.pipeline import run_recipe
from rlmm.policies.layout_io import load_layout
from rlmm.run_folder import RunFolder
from rlmm.train.engines import build_engine
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.grpo_source import GrpoSource
from rlmm.train.metrics import MetricsFile
from rollouts.store import read_trajectory

PICKY = (
    'rewards.terms=[{function: "tests/recipes/rewards.py:picky"}]',
    "stages.grpo.prompts_per_step=8",
    "stages.grpo.steps=1",
    "stages.grpo.objective.updates_per_rollout=1",
)


def first_rollout(folder: RunFolder) -> tuple[list[str], list[bool], dict[str, list[int]], list[str]]:
    """Group, kept and tokens of each row, and the prompts."""
    made, columns = read_trajectory(folder.stage("grpo") / "rollouts" / "step-000000.parquet")
    tokens = dict(zip(made.sample_id, made.ids.tolist(), strict=True))
    return list(made.group_id), list(columns["kept"]), tokens, list(columns["prompt"])


def metrics(folder: RunFolder) -> list[dict[str, float]]:
    return MetricsFile(folder.stage("grpo") / "metrics.jsonl").read()


def test_flat_groups_are_replaced_and_the_others_left_as_they_were(
    variant: Callable[..., Recipe], tmp_path: Path
) -> None:
    plain = run_recipe(variant(*PICKY, f"run_dir={tmp_path / 'plain'}"), lambda line: None)
    asked = (*PICKY, "stages.grpo.resample_flat=8", f"run_dir={tmp_path / 'again'}")
    replaced = run_recipe(variant(*asked), lambda line: None)
    groups, kept, tokens, prompts = first_rollout(plain)
    new_groups, new_kept, new_tokens, new_prompts = first_rollout(replaced)
    flat = [g for g, k in zip(groups, kept, strict=True) if not k]
    assert flat and any(kept), "the reward must leave some groups flat"
    assert all(new_kept) and all(len(prompt) % 2 for prompt in new_prompts)
    assert len(set(new_groups)) == len(set(groups)) == 8 and len(new_groups) == len(groups)
    for group, prompt, keep in zip(groups, prompts, kept, strict=True):
        assert keep == (group in new_groups) == (len(prompt) % 2 == 1)
    assert all(new_tokens[name] == ids for name, ids in tokens.items() if name in new_tokens)
    # Places keep their order, whoever fills them.
    assert [name.split("+")[0] for name in new_groups] == groups
    row = metrics(replaced)[0]
    thrown = sum(int(name.split("+")[1]) for name in set(new_groups) if "+" in name)
    assert row["group/replaced_share"] == pytest.approx(thrown / (thrown + 8))
    assert row["group/flat_share"] == 0 and metrics(plain)[0]["group/flat_share"] > 0


def test_what_is_flat_after_the_last_round_is_dropped(variant: Callable[..., Recipe], tmp_path: Path) -> None:
    constant = 'rewards.terms=[{function: "tests/recipes/rewards.py:picky", transform: {lo: 5.0, hi: 6.0}}]'
    recipe = variant(*PICKY, constant, "stages.grpo.resample_flat=2", f"run_dir={tmp_path / 'run'}")
    row = metrics(run_recipe(recipe, lambda line: None))[0]
    assert (row["group/flat_share"], row["group/replaced_share"]) == (1.0, pytest.approx(16 / 24))
    assert row["grad_norm"] == 0


def test_an_objective_that_counts_flat_groups_cannot_replace_them(variant: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="resample_flat replaces groups without spread, and objective dr_grpo"):
        variant("stages.grpo.resample_flat=1", "stages.grpo.objective.name=dr_grpo")


def test_the_entropy_bonus_acts_below_its_floor_alone(variant: Callable[..., Recipe], tmp_path: Path) -> None:
    bonus = "stages.grpo.objective.entropy.coefficient=0.5"
    acts = {}
    for floor in (1e-6, 50.0):
        asked = (bonus, f"stages.grpo.objective.entropy.floor={floor}", f"run_dir={tmp_path / str(floor)}")
        rows = metrics(run_recipe(variant(*asked), lambda line: None))
        acts[floor] = ["entropy_coefficient" in row for row in rows]
    # Nothing is known before the first step, so the bonus acts in it.
    assert acts == {1e-6: [True] + [False] * 5, 50.0: [True] * 6}


def test_a_token_weighting_in_the_recipe_is_used(variant: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("def nothing(view): return view.logp_BS * 0\n")
    silent = f"stages.grpo.objective.token_weighting={tmp_path / 'none.py'}:nothing"
    row = metrics(run_recipe(variant(silent, "stages.grpo.steps=2", f"run_dir={tmp_path / 'a'}"), lambda line: None))[0]
    assert (row["grad_norm"], row["token_weight"]) == (0, 0)
    example = "stages.grpo.objective.token_weighting=examples/token_weighting.py:open_decisions"
    row = metrics(run_recipe(variant(example, "stages.grpo.steps=2", f"run_dir={tmp_path / 'b'}"), lambda line: None))[
        0
    ]
    assert row["grad_norm"] > 0 and 0.2 <= row["token_weight"] < 0.3
    assert torch.isfinite(torch.tensor(row["loss"]))


def test_a_stage_that_raises_closes_its_engine(
    variant: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose servers would else stay to the end of the process, a notebook's perhaps. What is refused builds none."""
    closed: list[Any] = []

    def build(*given: Any, **named: Any) -> Any:
        engine: Any = build_engine(*given, **named)
        engine.close = lambda: closed.append(engine)
        return engine

    def fails(self: GrpoSource, step: int) -> list[GrpoBatch]:
        assert not closed
        raise LookupError("of a plug-in")

    monkeypatch.setattr("rlmm.train.grpo_source.build_engine", build)
    monkeypatch.setattr(GrpoSource, "micro_batches", fails)
    with pytest.raises(LookupError):
        run_recipe(variant(f"run_dir={tmp_path / 'fails'}"), lambda line: None)
    assert len(closed) == 1
    closed.clear()
    stale = ("stages.grpo.max_staleness=1", "stages.grpo.objective.mismatch={kind: truncate}")
    with pytest.raises(LookupError):
        run_recipe(variant(*stale, f"run_dir={tmp_path / 'ahead'}"), lambda line: None)
    assert not closed, "a rollout that is drawn ahead may be under way"


def test_all_weights_resume_bit_identically(
    variant: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the head only the rows of image codes are trained, as a parameter that is in no file."""

    class Killed(Exception):
        pass

    def whole(name: str) -> Recipe:
        return variant("stages.grpo.lora=null", f"run_dir={tmp_path / name}")

    made = GrpoSource.micro_batches

    def dies(self: GrpoSource, step: int) -> list[GrpoBatch]:
        if step == 4:  # the checkpoint is of step 3
            raise Killed
        return made(self, step)

    straight = run_recipe(whole("straight"), lambda line: None)
    monkeypatch.setattr(GrpoSource, "micro_batches", dies)
    with pytest.raises(Killed):
        run_recipe(whole("killed"), lambda line: None)
    monkeypatch.setattr(GrpoSource, "micro_batches", made)
    said: list[str] = []
    killed = run_recipe(whole("killed"), said.append)
    assert any("resuming from step 3 of 6" in line for line in said)
    weights = [load_file(run.stage("grpo") / "model" / "model.safetensors") for run in (straight, killed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    policy = whole("straight").policy
    assert isinstance(policy, CheckpointPolicy)
    start = load_file(Path(policy.path) / "model.safetensors")["lm_head.weight"]
    moved = (weights[0]["lm_head.weight"] != start).any(1)
    low, high = load_layout(straight.stage("grpo") / "model").image
    assert moved[low:high].all() and not moved[:low].any()


@pytest.mark.parametrize("objective", ["grpo", pytest.param("dr_grpo", marks=pytest.mark.long)])
def test_scoring_behind_generation_changes_nothing(
    variant: Callable[..., Recipe], tmp_path: Path, objective: str
) -> None:
    """Tokens, scores, advantages and their order are those of a rollout that is scored when all of it is there."""
    asked = (
        "stages.grpo.prompts_per_step=5", "stages.grpo.steps=1", f"stages.grpo.objective.name={objective}",
        "stages.grpo.objective.updates_per_rollout=1", "rewards.normalise=terms",
        "stages.grpo.objective.advantage.scale=batch_std",
    )  # fmt: skip
    found = {}
    for chunk in ("null", "1", "2", "5"):
        recipe = variant(*asked, f"stages.grpo.score_chunk={chunk}", f"run_dir={tmp_path / chunk}")
        folder = run_recipe(recipe, lambda line: None)
        made, columns = read_trajectory(folder.stage("grpo") / "rollouts" / "step-000000.parquet")
        names = ("prompt", "image", "reward", "reward_status", "advantage", "kept", "reward/darkness")
        found[chunk] = ([made.sample_id, made.ids.tolist(), *(list(columns[name]) for name in names)], made)
        assert {"time/rollout", "time/score"} <= metrics(folder)[0].keys()
    whole, trajectory = found.pop("null")
    for parts, other in found.values():
        assert parts == whole
        torch.testing.assert_close(other.sampler_logp, trajectory.sampler_logp, rtol=0, atol=1e-5)
