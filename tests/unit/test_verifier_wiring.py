"""How the verifier rewards are built, identified, cached, checked on gold pairs and imported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rewards import build
from rewards.base import Sample
from rewards.gold import HasGold, gold_check_pairs
from rewards.runner import RewardRunner
from rewards.verifier.errors import JudgeError
from rewards.verifier.yes_no import YesNoReward, read_questions
from rlmm.config.rewards import RewardTerm
from tests.unit.test_verifier_stub import MODEL, Reply, Stub, pictures, serving, tokens, words

ROOT = Path(__file__).resolve().parents[2]
DRAWN = Sample("s", "g", "a red cat", (Image.new("RGB", (5, 4), "red"),))


def reward(stub: Stub, questions: Any = None) -> YesNoReward:
    return YesNoReward(stub.client(), questions=read_questions(questions))


def test_the_fingerprint_has_what_decides_the_score_and_not_where_it_is_made() -> None:
    def printed(**options: Any) -> str:
        settings = {"url": "http://127.0.0.1:9", "model": MODEL, "check": False, **options}
        return build("yes_no", **settings).fingerprint()

    elsewhere = {"url": "https://other/v1", "timeout_s": 9, "retries": 0, "concurrency": 2, "backoff_s": 1}
    assert printed(**elsewhere) == printed()
    own = [{"name": "a", "ask": "Is it?"}]
    others = [
        {"model": "m"},
        {"min_mass": 0.6},
        {"top_logprobs": 5},
        {"combine": "mean"},
        {"questions": own},
        {"questions": [{**own[0], "ask": "Is it not?"}]},
        {"questions": [{**own[0], "weight": 2}]},
        {"extra_body": {"seed": 1}},
    ]
    assert len({printed(**options) for options in [{}, *others]}) == 1 + len(others)


def test_the_prompts_are_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tokens({"Yes": 1})) as stub:
        before = reward(stub).fingerprint()
        monkeypatch.setattr("rewards.verifier.prompts.SYSTEM", "Be kind.")
        assert reward(stub).fingerprint() != before


def test_the_runner_caches_scores_and_asks_again_after_a_failure() -> None:
    with serving([Reply({}, status=500), tokens({"Yes": 0.9, "No": 0.1})]) as stub:
        judge = YesNoReward(stub.client(retries=0))
        runner = RewardRunner(judge, batch_size=2, cache=8)
        (first,) = runner.score([DRAWN])
        scores = runner.score([DRAWN] * 3)
    assert first.status == "unavailable" and runner.stats.unavailable == {"declared": 1}
    assert [score.value for score in scores] == pytest.approx([0.9] * 3)
    assert len(stub.bodies) == 2 and runner.stats.retries == 0


def test_the_runners_deadline_bounds_a_slow_judge() -> None:
    with serving(Reply(tokens({"Yes": 0.9}).payload, delay_s=0.5)) as stub:
        (score,) = RewardRunner(reward(stub), deadline_s=0.1).score([DRAWN])
    assert score.status == "unavailable" and "0.1 s" in score.reason


def test_a_recipes_term_builds_the_reward_and_checks_the_server() -> None:
    with serving(tokens({"Yes": 0.9})) as stub:
        options = {"url": stub.url, "model": MODEL, "questions": [{"name": "faithful", "weight": 1}]}
        term = RewardTerm.model_validate({"name": "yes_no", "options": options})
        assert isinstance(build(term.name, **term.options), YesNoReward)
        assert stub.paths == ["/v1/models"]
        with pytest.raises(JudgeError, match="does not serve the model 'nobody'"):
            build("yes_no", url=stub.url, model="nobody")
        build("yes_no", url=stub.url, model="nobody", check=False)
    with pytest.raises(ValueError, match="no option 'ulr'. Nearest: url"):
        build("yes_no", ulr="a", url="b", model="c")
    with pytest.raises(ValueError, match="needs the option 'model'"):
        RewardTerm.model_validate({"name": "yes_no", "options": {"url": "a"}})


def sees_red(body: dict[str, Any], number: int) -> Reply:
    """A judge that says yes to as much as the last picture has of the wanted colour in its middle."""
    red, _, blue = pictures(body)[-1].getpixel((144, 144))  # type: ignore[misc]
    wanted = blue if "from red to blue" in words(body) else red
    return tokens({"Yes": 0.9, "No": 0.1} if wanted > 128 else {"Yes": 0.1, "No": 0.9})


@pytest.mark.parametrize(
    ("questions", "pairs"),
    [
        (None, 1),
        ([{"name": "faithful"}], 1),
        ([{"name": "followed"}], 1),
        ([{"name": "a", "ask": "?"}], 0),
        ([{"name": "faithful"}, {"name": "a", "ask": "?"}], 0),
    ],
)
def test_the_built_in_questions_bring_a_gold_pair(questions: Any, pairs: int) -> None:
    with serving(sees_red) as stub:
        judge = reward(stub, questions=questions)
        assert isinstance(judge, HasGold) and len(judge.gold()) == pairs
        if pairs:
            assert gold_check_pairs(judge, judge.gold()).passed
    if pairs:
        with serving(tokens({"Yes": 0.5, "No": 0.5})) as stub:
            assert not gold_check_pairs(reward(stub, questions=questions), judge.gold()).passed


@pytest.mark.parametrize("name", ["yes_no", "viescore"])
def test_a_judge_needs_no_torch_and_a_missing_httpx_is_named(name: str) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "if sys.argv[1] == 'missing': sys.modules['httpx'] = None\n"
        "import rewards\n"
        "assert sys.argv[1] == 'missing' or 'httpx' not in sys.modules\n"
        f"rewards.build({name!r}, url='http://127.0.0.1:9', model='m', check=False)\n"
    )
    run: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True}
    there = subprocess.run([sys.executable, "-c", code, "there"], **run)
    assert there.returncode == 0, there.stderr
    missing = subprocess.run([sys.executable, "-c", code, "missing"], **run)
    assert "which is not installed: pip install httpx" in missing.stderr
