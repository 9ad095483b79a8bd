"""The examples of rewards, and rewards that an installed package brings by an entry point."""

import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from rewards import build, check_options
from rewards.base import Sample, SeesGroups
from rewards.functions import RewardLoadError
from rewards.gold import HasGold, gold_check_pairs
from rewards.plugins import plugins
from rewards.runner import RewardRunner
from rlmm.cli import app
from rlmm.config.rewards import Rewards
from rlmm.rewarding import gold_results

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TARGETS = ("custom_reward.py:ink", "trl_reward.py:redness", "group_reward.py:Finest")


@pytest.mark.parametrize("target", TARGETS)
def test_an_example_is_short_scores_and_brings_its_gold(target: str) -> None:
    assert len((EXAMPLES / target.partition(":")[0]).read_text().splitlines()) < 60
    reward = build("function", target=str(EXAMPLES / target))
    pictures = [Image.new("RGB", (8, 8), name) for name in ("red", "white", "black")]
    pictures[1].paste("black", (0, 0, 3, 3))
    samples = [Sample(str(at), "g", "a square", (image,)) for at, image in enumerate(pictures)]
    scores = RewardRunner(reward).score(samples)
    assert all(score.status == "ok" for score in scores) and len({score.value for score in scores}) > 1
    assert isinstance(reward, HasGold)
    pairs = list(reward.gold())
    assert pairs and gold_check_pairs(reward, pairs).passed
    turned = [type(pair)(pair.bad, pair.good) for pair in pairs]
    assert not gold_check_pairs(reward, turned).passed, "a check that cannot fail checks nothing"


def test_finest_by_hand() -> None:
    reward = build("function", target=str(EXAMPLES / "group_reward.py:Finest"), step=1)
    assert isinstance(reward, SeesGroups)
    lines = [Image.new("L", (4, 1)) for _ in range(4)]
    lines[1].putpixel((0, 0), 30)
    lines[2].putpixel((1, 0), 30)
    samples = [Sample(str(at), "one" if at < 3 else "two", "", (image,)) for at, image in enumerate(lines)]
    assert [score.value for score in reward.score(samples)] == [0, 0.5, 1, None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two rewards, on the path as pip leaves one."""
    package, record = tmp_path / "fine_rewards.py", tmp_path / "fine_rewards-1.0.dist-info"
    package.write_text(
        (EXAMPLES / "group_reward.py").read_text() + "\n\ndef flat(samples):\n    return [0.5] * len(samples)\n"
    )
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: fine-rewards\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text("[rlmm.rewards]\nfinest = fine_rewards:Finest\nflat = fine_rewards:flat\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fine_rewards", raising=False)
    return record / "entry_points.txt"


def test_an_installed_reward_is_one_by_name(installed: Path) -> None:
    check_options("finest", ["step"])
    assert "fine_rewards" not in sys.modules, "what no recipe names is not imported"
    section = Rewards.model_validate({"terms": [{"name": "finest", "options": {"step": 2}}, {"name": "flat"}]})
    results = gold_results(section)
    assert results["finest"] is not None and results["finest"].passed and results["flat"] is None
    assert build("finest", step=3).fingerprint() == "finest/1 step=3"
    sample = Sample("s", "g", "")
    assert [score.value for score in RewardRunner(build("flat")).score([sample])] == [0.5]
    listed = CliRunner().invoke(app, ["reward", "list"]).output
    assert "finest  (fine_rewards:Finest)" in listed and "ocr" in listed


def test_what_is_wrong_with_an_installed_reward_is_named(installed: Path) -> None:
    with pytest.raises(ValueError, match="no reward 'finst'. Nearest: finest"):
        check_options("finst", [])
    with pytest.raises(RewardLoadError, match="takes no option 'stp'. Nearest: step"):
        build("finest", stp=1)
    with pytest.raises(RewardLoadError, match="takes no option 'stp'"):
        build("flat", stp=1)


def test_a_name_is_one_rewards_alone(installed: Path) -> None:
    installed.write_text("[rlmm.rewards]\nocr = fine_rewards:Finest\n")
    with pytest.raises(ValueError, match="'ocr' is taken more than once: by fine_rewards:Finest and a built-in"):
        plugins(["ocr"])
    again = installed.parent.parent / "other-1.0.dist-info"
    again.mkdir()
    (again / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (again / "entry_points.txt").write_text("[rlmm.rewards]\nocr = other:Finest\n")
    with pytest.raises(ValueError, match="by .*fine_rewards:Finest.* and .*"):
        plugins([])
