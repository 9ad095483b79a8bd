"""The checklist, the expected digit, the rubric with reasons, and the comparison with a target image."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards import build
from rewards.base import Sample
from rewards.gold import HasGold, gold_check_pairs
from rewards.verifier.answers import Answer
from rewards.verifier.checklist import ChecklistReward, read_atoms
from rewards.verifier.criteria import TARGET, read_criteria
from rewards.verifier.errors import JudgeError
from rewards.verifier.expected_score import ExpectedScoreReward
from rewards.verifier.rubric import RubricReward
from rewards.verifier.tokens import expected_digit
from tests.unit.test_verifier_stub import MODEL, Reply, keys_of, pictures, says, serving, tokens, words

NOISE = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
PICTURE, SOURCE, WANTED = (Image.fromarray(pixels) for pixels in NOISE)


def drawn(*questions: Any, **fields: Any) -> Sample:
    return Sample("s", "g", "a red cat", (PICTURE,), row={"questions": list(questions)}, **fields)


def by_phrase(chances: Mapping[str, float]) -> Any:
    """A judge that says yes to a question with a phrase in it with so much probability."""

    def answer(body: dict[str, Any], number: int) -> Reply:
        (yes,) = [chance for phrase, chance in chances.items() if phrase in words(body)]
        return tokens({"Yes": yes, "No": 1 - yes})

    return answer


QUESTIONS = [
    "Is there a cat?",
    {"ask": "Is it red?", "needs": [0], "weight": 3},
    {"ask": "Is it night?", "answer": "no"},
]


@pytest.mark.parametrize(
    ("aggregate", "value"),
    # the good answers have 0.9, 0.6 and 1 - 0.3 = 0.7; weights 1, 3, 1
    [("mean", 2.2 / 3), ("weighted", (0.9 + 1.8 + 0.7) / 5), ("all", 1.0)],
)
def test_a_checklists_aggregates(aggregate: Any, value: float) -> None:
    with serving(by_phrase({"a cat?": 0.9, "it red?": 0.6, "it night?": 0.3})) as stub:
        (score,) = ChecklistReward(stub.client(), aggregate=aggregate).score([drawn(*QUESTIONS)])
    assert score.value == pytest.approx(value)
    assert score.parts["lowest"] == pytest.approx(0.6) and score.parts["mass"] == pytest.approx(1)
    assert score.reason == "Is there a cat? 0.900; Is it red? 0.600; Is it night? 0.700"
    assert len(stub.bodies) == 3 and all(body["max_completion_tokens"] == 1 for body in stub.bodies)


def test_a_question_counts_nothing_where_what_it_needs_is_not_passed() -> None:
    chain = ["Is there a cat?", {"ask": "Is it red?", "needs": [0]}, {"ask": "Is the red dark?", "needs": [1]}]
    with serving(by_phrase({"a cat?": 0.4, "it red?": 0.9, "red dark?": 0.9})) as stub:
        (score,) = ChecklistReward(stub.client()).score([drawn(*chain)])
    assert score.value == pytest.approx(0.4 / 3), "through the second, the third needs the first"
    assert (score.parts["all"], score.parts["lowest"]) == (0, 0)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (None, "a list of questions, got None"),
        ([], "a list of questions"),
        ("Is it red?", "a list of questions"),
        ([{"question": "Is it?"}], "has no `ask`"),
        ([" "], "is no text"),
        ([{"ask": "?", "wieght": 1}], "no setting 'wieght'. Nearest: weight"),
        ([{"ask": "?", "answer": "maybe"}], "it is yes or no"),
        ([{"ask": "?", "weight": 0}], "weight above 0"),
        ([{"ask": "?", "needs": [0]}], "numbers of earlier questions"),
        (["?", {"ask": "?", "needs": "0"}], "numbers of earlier questions"),
        (["?", {"ask": "?", "needs": [-1]}], "numbers of earlier questions"),
    ],
)
def test_a_row_whose_questions_cannot_be_read_is_unavailable_and_not_asked_about(listed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        read_atoms(listed)
    with serving(tokens({"Yes": 0.9})) as stub:
        (score,) = ChecklistReward(stub.client()).score([Sample("s", "g", "p", (PICTURE,), row={"questions": listed})])
    assert score.status == "unavailable" and message in score.reason and stub.bodies == []


def test_a_parquet_rows_missing_fields_are_the_defaults() -> None:
    (atom,) = read_atoms([{"ask": "?", "answer": None, "weight": None, "needs": None}])
    assert (atom.answer, atom.weight, atom.needs) == ("yes", 1.0, ())


def digits(chances: Mapping[str, float], text: str = "7", finish: str = "length") -> Answer:
    return Answer(text, finish, tuple((token, math.log(chance)) for token, chance in chances.items()))


def test_the_expected_digit_by_hand() -> None:
    # spellings of 7 have 0.5, 3 has 0.25, of a mass of 0.75: (7 * 0.5 + 3 * 0.25) / 0.75
    mean, mass = expected_digit(digits({"7": 0.3, " 7": 0.15, "\u01207": 0.05, "3": 0.25, "the": 0.2}), 0, 9, 0.5)
    assert (mean, mass) == pytest.approx((4.25 / 0.75, 0.75))
    # only the scale's own digits count: 9 and 0 lie outside 1 to 5
    mean, mass = expected_digit(digits({"5": 0.6, "9": 0.3, "0": 0.1}, "5"), 1, 5, 0.5)
    assert (mean, mass) == pytest.approx((5, 0.6))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (digits({"7": 0.4, "a": 0.6}), "the digits 0 to 9 have a probability of 0.400 together"),
        (digits({"\u00b2": 0.9, "10": 0.05}), "probability of 0.000"),
        (digits({"1": 0.9}, "10"), "a number of several digits"),
        (digits({"7": 0.9}, finish="content_filter"), "content_filter"),
        (Answer("7", "stop"), "gave no log-probabilities"),
    ],
)
def test_what_is_no_digit_of_the_scale_is_refused(answer: Answer, message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        expected_digit(answer, 0, 9, 0.5)


def test_an_expected_scores_value_and_parts() -> None:
    chances = {"what was asked for": {"9": 0.5, "0": 0.5}, "holds together": {"6": 1.0}}
    criteria = read_criteria([{"name": "success", "weight": 2}, {"name": "naturalness"}])

    def answer(body: dict[str, Any], number: int) -> Reply:
        (found,) = [chance for phrase, chance in chances.items() if phrase in words(body)]
        return tokens(found)

    with serving(answer) as stub:
        (mean,) = ExpectedScoreReward(stub.client(), criteria=criteria, combine="mean").score([drawn()])
        (root,) = ExpectedScoreReward(stub.client(), criteria=criteria).score([drawn()])
    # digits 4.5 and 6 on 0 to 9
    assert mean.parts == pytest.approx({"success": 0.5, "naturalness": 2 / 3, "mass": 1})
    assert mean.value == pytest.approx((2 * 0.5 + 2 / 3) / 3)
    assert root.value == pytest.approx((0.25 * 2 / 3) ** (1 / 3))
    assert {len(pictures(body)) for body in stub.bodies} == {1}


def test_over_edit_is_asked_of_edits_alone_and_looks_of_the_result_alone() -> None:
    with serving(tokens({"9": 1.0})) as stub:
        edit = drawn(source_images=(SOURCE,))
        scores = ExpectedScoreReward(stub.client()).score([drawn(), edit])
    assert [sorted(set(score.parts) - {"mass"}) for score in scores] == [
        ["artefacts", "naturalness", "success"],
        ["artefacts", "naturalness", "over_edit", "success"],
    ]
    seen = {("red cat" in words(body), len(pictures(body))) for body in stub.bodies}
    assert seen == {(True, 1), (True, 2), (False, 1)}


OWN = [{"name": "mood", "low": "it is dull", "high": "it is merry.", "weight": 3}, {"name": "success"}]


def marks(body: Mapping[str, Any], **given: int) -> Reply:
    return says(json.dumps({"reasoning": "seen", **{key: given.get(key, 5) for key in keys_of(body)}}))


def test_a_rubrics_criteria_of_your_own() -> None:
    with serving(lambda body, number: marks(body, mood=8, success=4)) as stub:
        (score,) = RubricReward(stub.client(), criteria=read_criteria(OWN), combine="mean").score([drawn()])
    assert score.value == pytest.approx((3 * 0.8 + 0.4) / 4)
    assert score.parts == pytest.approx({"mood": 0.8, "success": 0.4}) and score.reason == "seen"
    (body,) = stub.bodies
    assert "- mood: 0 means that it is dull; 10 means that it is merry.\n" in words(body)
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["reasoning", "mood", "success"]


@pytest.mark.parametrize("reasks", [0, 1, 2])
def test_a_rubric_is_asked_again_a_bounded_number_of_times(reasks: int) -> None:
    criteria = read_criteria([{"name": "success"}])
    with serving(says("9 of 10!")) as stub:
        (score,) = RubricReward(stub.client(), criteria=criteria, reasks=reasks).score([drawn()])
    assert score.status == "unavailable" and "no JSON object" in score.reason
    assert len({words(body) for body in stub.bodies}) == len(stub.bodies) == 1 + reasks, "in other words each time"
    replies = [says("?")] * reasks + [says('{"reasoning": "", "success": 7}')]
    with serving(replies) as stub:
        (score,) = RubricReward(stub.client(), criteria=criteria, reasks=reasks).score([drawn()])
    assert score.value == pytest.approx(0.7)


def test_a_target_is_shown_before_the_result() -> None:
    with serving(lambda body, number: marks(body, same_content=8, same_look=2)) as stub:
        judge = RubricReward(stub.client(), criteria=TARGET)
        plain, edit, lacking = judge.score(
            [
                drawn(target_images=(WANTED,)),
                drawn(target_images=(WANTED,), source_images=(SOURCE,)),
                drawn(),
            ]
        )
    assert plain.value == edit.value == pytest.approx(0.4)
    assert lacking.status == "unavailable" and "compares with a target image" in lacking.reason
    shown = sorted(([np.asarray(one) for one in pictures(body)] for body in stub.bodies), key=len)
    assert np.array_equal(shown[0], NOISE[[2, 0]]) and np.array_equal(shown[1], NOISE[[1, 2, 0]])
    assert "The wanted picture:" in words(stub.bodies[0])


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "nothing to score"),
        ([{"name": "sucess"}], "needs low and high. Nearest: success"),
        ([{"name": "success", "low": "a"}], "is built in"),
        (
            [{"name": "a", "low": "x", "high": "y"}, {"name": "a", "low": "x", "high": "y"}],
            "two criteria are called 'a'",
        ),
        ([{"name": "mass", "low": "x", "high": "y"}], "cannot be called 'mass'"),
        ([{"name": "a", "low": "x", "high": "y", "weight": -1}], "weight above 0"),
        ([{"name": "a", "low": "x", "high": "y", "shows": "promt"}], "Nearest: prompt"),
        ([{"name": "a", "low": "x", "heigh": "y"}], "Nearest: high"),
        (["success"], "a criterion is written"),
    ],
)
def test_criteria_that_cannot_work_say_why(listed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_criteria(listed)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("checklist", {"aggregate": "al"}, "Nearest: all"),
        ("expected_score", {"lowest": 5, "highest": 5}, "lowest < highest"),
        ("expected_score", {"highest": 10}, "<= 9"),
        ("rubric", {"reasks": 3}, "reasks 0 to 2"),
        ("rubric", {"combine": "maen"}, "Nearest: mean"),
        ("target_match", {"criteria": []}, "no option 'criteria'"),
        ("checklist", {"timeout_s": 0}, "timeout_s must be above 0"),
    ],
)
def test_options_that_cannot_work_say_why(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, url="http://127.0.0.1:9", model=MODEL, check=False, **options)


VARIED: dict[str, list[dict[str, Any]]] = {
    "checklist": [{"column": "q"}, {"aggregate": "all"}, {"min_mass": 0.6}],
    "expected_score": [{"criteria": OWN}, {"criteria": OWN[:1]}, {"lowest": 1}, {"combine": "mean"}],
    "rubric": [{"criteria": OWN}, {"reasks": 1}, {"max_tokens": 9}, {"combine": "mean"}],
    "target_match": [{"combine": "mean"}, {"extra_body": {"seed": 1}}],
}


@pytest.mark.parametrize("name", VARIED)
def test_fingerprints_have_what_decides_the_score(name: str) -> None:
    def printed(**options: Any) -> str:
        return build(name, **{"url": "http://127.0.0.1:9", "model": MODEL, "check": False, **options}).fingerprint()

    assert printed(url="http://elsewhere", concurrency=1) == printed()
    assert len({printed(**options) for options in [{}, {"model": "m"}, *VARIED[name]]}) == 2 + len(VARIED[name])


def answered(body: Mapping[str, Any], right: bool) -> Reply:
    """High or low, in whatever form the judge is asked."""
    if "response_format" in body:
        return marks(body, **dict.fromkeys(keys_of(body), 9 if right else 2))
    if body["max_completion_tokens"] == 2:
        return tokens({"9": 0.9, "2": 0.1} if right else {"2": 0.9, "9": 0.1})
    return tokens({"Yes": 0.9, "No": 0.1} if right else {"Yes": 0.1, "No": 0.9})


def looks(body: dict[str, Any], number: int) -> Reply:
    """A judge that wants the middle of the last picture to be of the colour asked for; how it looks is well always."""
    red, _, blue = pictures(body)[-1].getpixel((144, 144))  # type: ignore[misc]
    right = (blue if "from red to blue" in words(body) else red) > 128
    return answered(body, right or "<prompt>" not in words(body))


@pytest.mark.parametrize("name", VARIED)
def test_gold_pairs_tell_a_judge_that_looks_from_one_that_does_not(name: str) -> None:
    with serving(looks) as stub:
        judge = build(name, url=stub.url, model=MODEL)
        assert isinstance(judge, HasGold) and judge.gold()
        assert gold_check_pairs(judge, judge.gold()).passed
    with serving(lambda body, number: answered(body, True)) as stub:
        judge = build(name, url=stub.url, model=MODEL)
        assert isinstance(judge, HasGold) and not gold_check_pairs(judge, judge.gold()).passed
