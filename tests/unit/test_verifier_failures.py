"""No failure of a judge, of any kind, ever becomes a number."""

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from PIL import Image

from rewards.base import Reward, Sample
from rewards.verifier.checklist import ChecklistReward
from rewards.verifier.criteria import TARGET
from rewards.verifier.expected_score import ExpectedScoreReward
from rewards.verifier.rubric import RubricReward
from rewards.verifier.viescore import VieScoreReward
from rewards.verifier.yes_no import YesNoReward
from tests.unit.test_verifier_stub import MODEL, Reply, Stub, first_token, keys_of, says, serving, tokens, words

GIVEN: Any = {"target_images": (Image.new("RGB", (4, 4), "red"),), "row": {"questions": ["Is it red?", "Is it a cat?"]}}
SOURCE = Image.new("RGB", (4, 4), "blue")
SAMPLES = [
    Sample("d", "g", "a red cat", (Image.new("RGB", (4, 4), "red"),), **GIVEN),
    Sample("e", "g", "paint it", (Image.new("RGB", (4, 4)),), source_images=(SOURCE,), **GIVEN),
]
JUDGES: dict[str, Callable[..., Reward]] = {
    "yes_no": YesNoReward,
    "viescore": VieScoreReward,
    "checklist": ChecklistReward,
    "expected_score": ExpectedScoreReward,
    "rubric": RubricReward,
    "target_match": partial(RubricReward, criteria=TARGET),
}


def echo(body: dict[str, Any], number: int) -> Reply:
    """What was asked, said again."""
    return says(words(body))


def schema_echo(body: dict[str, Any], number: int) -> Reply:
    """The form that was asked for, in place of an answer in it."""
    return says(json.dumps(body.get("response_format", {"score": "<0-10>"})))


SERVER_FAILURES: dict[str, Reply | Callable[[dict[str, Any], int], Reply]] = {
    "an echo": echo,
    "an echo of the form": schema_echo,
    "a refusal": says("I'm sorry, but I cannot rate this picture. Its score would be 0."),
    "an empty object": says("{}"),
    "reset": Reply(reset=True),
    "an empty payload": Reply({}),
    "500": Reply({}, status=500),
    "503 in HTML": Reply(raw=b"<html>", status=503),
    "429": Reply({}, status=429),
    "400": Reply({}, status=400),
    "401": Reply({}, status=401),
    "a redirect": Reply({}, status=302, headers={"Location": "/"}),
    "dropped": Reply(drop=True),
    "late": Reply(says("Yes").payload, delay_s=3.0),
    "HTML": Reply(raw=b"<html>"),
    "nothing": Reply(raw=b""),
    "half": Reply(raw=b'{"choices": [', headers={"Content-Length": "13"}),
    "fewer bytes than announced": Reply(raw=b"{}", headers={"Content-Length": "99", "Connection": "close"}),
    "no choices": Reply({"choices": []}),
    "an error with status 200": Reply({"error": {"message": "overloaded"}}),
    "a number": Reply(7),
    "truncated": says("", finish="length"),
    "filtered": tokens({"Yes": 1.0}, finish="content_filter"),
    "null": says(None),
    "low mass": tokens({"I": 0.9, "Yes": 0.05}),
    "no mass": tokens({"I": 0.9}),
    "NaN": first_token([{"token": "Yes", "logprob": float("nan")}]),
    "text for a probability": first_token([{"token": "Yes", "logprob": "-0.1"}]),
    "no token": first_token([{"logprob": -0.1}]),
    "a word": says("Yes"),
    "a bare number": says("9"),
    "marks of another scale": says(json.dumps(dict.fromkeys(["success", "rest_unchanged", "naturalness"], 95))),
}


def no_numbers(stub: Stub, name: str, model: str = MODEL) -> None:
    judge = JUDGES[name](stub.client(retries=1, timeout_s=1.0, model=model))
    for score in judge.score(SAMPLES):
        assert (score.status, score.value, dict(score.parts)) == ("unavailable", None, {})
        assert score.reason


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("failure", SERVER_FAILURES)
def test_a_failure_is_unavailable_with_a_reason(name: str, failure: str) -> None:
    with serving(SERVER_FAILURES[failure]) as stub:
        no_numbers(stub, name)


@pytest.mark.parametrize("name", JUDGES)
def test_so_are_a_wrong_model_and_a_server_that_is_gone(name: str) -> None:
    with serving(says("Yes")) as stub:
        no_numbers(stub, name, model="nobody")
    no_numbers(stub, name)


def test_whatever_a_judge_writes_only_whole_marks_in_range_count() -> None:
    chance = random.Random(0)

    def junk(body: dict[str, Any], number: int) -> Reply:
        pieces = [
            "{",
            "}",
            '"success": 9',
            '"success": 12',
            '"naturalness": 3',
            ",",
            "9/10",
            "[8]",
            '"rest_unchanged": 2',
        ]
        return says("".join(chance.choices(pieces, k=chance.randint(0, 7))))

    def marks(body: dict[str, Any], number: int) -> Reply:
        return says(json.dumps({key: chance.choice([-1, 0, 5, 10, 11, 7.0, "7", None]) for key in keys_of(body)}))

    with serving(junk) as stub:
        no_numbers(stub, "viescore")
    with serving(marks) as stub:
        scores = VieScoreReward(stub.client(concurrency=1)).score(SAMPLES * 20)
    assert {score.status for score in scores} == {"ok", "unavailable"}
    values = {score.value for score in scores if score.value is not None}
    assert values <= {0.0, 0.5, 50**0.5 / 10, 1.0}, "the square roots of products of 0, 5 and 10"
