"""What judges have said is in every checkpoint: a resumed run asks about nothing twice, and ends as one left alone."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rewards.base import Sample
from rlmm.config.data import WordsData
from rlmm.config.recipe import Recipe
from rlmm.data.words import split_words
from rlmm.pipeline import run_recipe
from rlmm.run_folder import RunFolder
from rlmm.train.experience import Experience
from rlmm.train.grpo_source import GrpoSource
from rlmm.train.metrics import MetricsFile

HERE = "tests.integration.test_score_cache"
ASKED: dict[str, list[bytes]] = {"train": [], "watch": []}
"""The pictures, with their prompts, that each judge was asked about, in order."""


def _moody(judge: str, samples: Sequence[Sample]) -> list[float]:
    """Another answer each time that it is asked."""
    seen = ASKED[judge]
    answers = []
    for sample in samples:
        answers.append(random.Random(f"{judge} {len(seen)}").random())
        seen.append(sample.prompt.encode() + sample.images[0].tobytes())
    return answers


def moody(samples: list[Sample]) -> list[float]:
    return _moody("train", samples)


def moody_watch(samples: list[Sample]) -> list[float]:
    return _moody("watch", samples)


@pytest.fixture
def recipe(variant: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """Two prompts, the same in every rollout, whose pictures are often the same ones."""
    words = sum(map(len, split_words(WordsData())))
    settings = (
        f"data={{kind: words, train_images: 2, held_out_words: {words - 2}}}",
        f"rewards={{terms: [{{function: '{HERE}:moody'}}]}}",
        f"held_out={{terms: [{{function: '{HERE}:moody_watch'}}]}}",
        "stages.grpo.objective.updates_per_rollout=1",
        "stages.grpo.sampling={temperature: 0.05}",
        "stages.grpo.steps=4",
        "stages.grpo.held_out_every=1",
    )
    return lambda name, *more: variant(*settings, f"run_dir={tmp_path / name}", *more)


def ran(recipe: Recipe) -> RunFolder:
    return run_recipe(recipe, lambda line: None)


def left(folder: RunFolder) -> dict[str, Any]:
    """Weights and figures of the stage."""
    rows = MetricsFile(folder.stage("grpo") / "metrics.jsonl").read()
    untimed = [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]
    return {"rows": untimed, "weights": (folder.stage("grpo") / "model" / "model.safetensors").read_bytes()}


def forget() -> None:
    for seen in ASKED.values():
        seen.clear()


@pytest.mark.parametrize("every", [2, 4], ids=["a checkpoint", "no checkpoint, but finished rollouts"])
def test_a_resumed_run_asks_about_no_sample_again(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    class Killed(Exception):
        pass

    make = GrpoSource.make

    def dies(self: GrpoSource, rollout: int) -> Experience:
        if rollout == 2:
            raise Killed
        return make(self, rollout)

    often = f"stages.grpo.checkpoint_every={every}"
    forget()
    alone = left(ran(recipe("alone", often)))
    asked = {judge: list(seen) for judge, seen in ASKED.items()}
    assert all(len(seen) == len(set(seen)) < 4 * 8 for seen in asked.values())
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(GrpoSource, "make", dies)
        with pytest.raises(Killed):
            ran(recipe("killed", often))
    assert all(8 < len(seen) < 2 * 8 for seen in ASKED.values())
    assert left(ran(recipe("killed", often))) == alone
    assert asked == ASKED
