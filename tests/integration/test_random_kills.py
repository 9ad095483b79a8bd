"""Forty kills at arbitrary moments: the same command, run until it ends, leaves the same bits as a run left alone.

Two runs of four kills of each case: GRPO, preferences and a masked policy alone, GRPO and preferences on two processes,
which die together, as a machine does. The moments are spread evenly over the lines that the command says (one a step, a
temperature, a stage), and are any time until the next line, drawn from a fixed seed. Where in the code that is is the
machine's affair, a half-written file included; `test_resume` kills at places of interest.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.kill_driver import RECIPE, digest
from tests.integration.killing import KILLS, RUNS, Case, Command, Whole, moments, stored

ATTEMPTS = 4
CASES = {
    "grpo": Case(RECIPE, 1),
    "preferences": Case(RECIPE.with_name("tiny_dpo.yaml"), 1),
    "masked": Case(RECIPE.with_name("tiny_masked.yaml"), 1),
    "grpo of two": Case(RECIPE, 2),
    "preferences of two": Case(RECIPE.with_name("tiny_dpo.yaml"), 2),
}


def left(folder: Path) -> dict[str, str]:
    """Digests of weights, metrics, evaluation, stored rollouts and exported weights."""
    exported = [folder / "adapter" / "adapter_model.safetensors", folder / "merged" / "model.safetensors"]
    rollouts = sorted(folder.glob("stages/*/rollouts/*.parquet"))
    more = {path: path.read_bytes() for path in exported} | {path: stored(path) for path in rollouts}
    return digest(folder) | {str(path.relative_to(folder)): hashlib.sha256(b).hexdigest() for path, b in more.items()}


@pytest.fixture(scope="module", params=CASES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("whole") / "run"
    said, seconds = Command(folder, case).finish()
    return Whole(case, left(folder), said, seconds)


@pytest.mark.long
@pytest.mark.parametrize("whole", ["grpo"], indirect=True)
def test_the_comparison_covers_what_a_run_leaves(whole: Whole) -> None:
    names = " ".join(whole.files)
    for part in ("codec.safetensors", "sft/model", "grpo/model", "metrics", "eval", "adapter", "merged", "parquet"):
        assert part in names


@pytest.mark.long
@pytest.mark.parametrize("run", range(RUNS))
def test_four_kills_leave_no_trace(whole: Whole, run: int, tmp_path: Path) -> None:
    kills: list[str] = []
    for attempt in range(ATTEMPTS):
        folder = tmp_path / f"run{attempt}"
        for moment in moments(run, whole)[len(kills) :]:
            sooner = replace(moment, delay=moment.delay / 2**attempt)
            found = Command(folder, whole.case).kill_at(sooner)
            # The kill before came later than meant, or this run was faster than the whole one was: what is left of them
            # goes to another run.
            if found is None:
                break
            kills.append(found)
        Command(folder, whole.case).finish()
        files = left(folder)
        differing = [name for name in {**files, **whole.files} if files.get(name) != whole.files.get(name)]
        assert not differing, kills
        if len(kills) == KILLS:
            break
    print(*kills, sep="\n")
    assert len(kills) == KILLS
