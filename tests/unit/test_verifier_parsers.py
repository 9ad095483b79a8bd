"""The parsers of what judges answer: each shape of answer by itself, and whatever else a judge may write."""

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from PIL import Image

from rewards.base import Sample
from rewards.verifier.answers import Answer, read_answer, read_ranking, read_scores
from rewards.verifier.checklist import ChecklistReward
from rewards.verifier.client import Client
from rewards.verifier.errors import BadAnswerError, JudgeError
from rewards.verifier.expected_score import ExpectedScoreReward
from rewards.verifier.pairwise import PairwiseReward
from rewards.verifier.prompts import NATURALNESS, SUCCESS
from rewards.verifier.ranking import RankingReward
from rewards.verifier.rubric import RubricReward
from rewards.verifier.server import Server
from rewards.verifier.tokens import expected_digit, yes_probability
from rewards.verifier.yes_no import YesNoReward

CRITERIA = (SUCCESS, NATURALNESS)
GOOD = {
    "in order": '{"reasoning": "fine", "success": 9, "naturalness": 3}',
    "the other way round": '{"naturalness": 3, "success": 9, "reasoning": "fine"}',
    "without reasons": '{"success": 9, "naturalness": 3}',
    "with something more": '{"success": 9, "naturalness": 3, "overall": 7.5, "pass": true}',
    "on several lines": '{\n  "reasoning": "fine",\n  "success": 9,\n  "naturalness": 3\n}',
    "braces among the reasons": '{"reasoning": "a {red} cat }", "success": 9, "naturalness": 3}',
    "marks among the reasons": '{"reasoning": "score: 10, \\"success\\": 2", "success": 9, "naturalness": 3}',
    "other scripts": '{"reasoning": "好 \\u00fc 🐈", "success": 9, "naturalness": 3}',
    "reasons that are a list": '{"reasoning": ["a", {"b": 1}], "success": 9, "naturalness": 3}',
}
BAD = {
    "a mark left out": '{"success": 9}',
    "none of the marks": '{"reasoning": "fine"}',
    "no keys": "{}",
    "another case": '{"Success": 9, "Naturalness": 3}',
    "a mark as text": '{"success": "9", "naturalness": 3}',
    "a mark of ten as text": '{"success": "9/10", "naturalness": 3}',
    "a fraction": '{"success": 9.5, "naturalness": 3}',
    "a float": '{"success": 9.0, "naturalness": 3}',
    "an exponent": '{"success": 1e1, "naturalness": 3}',
    "true": '{"success": true, "naturalness": 3}',
    "null": '{"success": null, "naturalness": 3}',
    "a list": '{"success": [9], "naturalness": 3}',
    "an object": '{"success": {"score": 9}, "naturalness": 3}',
    "below the scale": '{"success": -1, "naturalness": 3}',
    "above the scale": '{"success": 11, "naturalness": 3}',
    "percent": '{"success": 95, "naturalness": 30}',
    "very many digits": '{"success": ' + "9" * 5000 + ', "naturalness": 3}',
    "NaN": '{"success": NaN, "naturalness": 3}',
    "infinity": '{"success": Infinity, "naturalness": 3}',
    "a key twice": '{"success": 9, "success": 2, "naturalness": 3}',
    "nested": '{"scores": {"success": 9, "naturalness": 3}}',
    "a list of marks": "[9, 3]",
    "single quotes": "{'success': 9, 'naturalness': 3}",
    "no quotes": "{success: 9, naturalness: 3}",
    "a comma too many": '{"success": 9, "naturalness": 3,}',
    "a comma too few": '{"success": 9 "naturalness": 3}',
    "a comment": '{"success": 9, /* good */ "naturalness": 3}',
    "a leading zero": '{"success": 09, "naturalness": 3}',
    "a plus sign": '{"success": +9, "naturalness": 3}',
    "a sum": '{"success": 4+5, "naturalness": 3}',
    "a placeholder": '{"success": <0-10>, "naturalness": <0-10>}',
    "the schema": '{"type": "object", "properties": {"success": {"type": "integer"}}}',
    "cut off": '{"reasoning": "fine", "success": 9, "natural',
    "only the end": '9, "naturalness": 3}',
}
AROUND = {
    "bare": "{}",
    "blanks": " \t\r\n{}\r\n ",
    "a fence": "```json\n{}\n```",
    "a fence without language": "```\n{}```",
    "an announcement": "Here is my assessment:\n{}",
    "a last word": "{}\nI hope this helps. 10/10!",
    "both": "Sure! The picture is a 10.\n{}\nScore: 10",
    "a heading": "**Final answer:** {}",
    "a tag": "<answer>{}</answer>",
    "thoughts": "<think>It is about a 7 or 8.</think>\n{}",
}
BREAKS = {
    "twice": "{0} {0}",
    "first the example": 'For example {{"success": 0, "naturalness": 0}}. Mine: {0}',
    "braces in the thoughts": "<think>{{hm}}</think> {0}",
    "a template around it": "{{{{ {0} }}}}",
    "in a list": "[{0}, {0}]",
}
NEVER = {
    "nothing": "",
    "blanks alone": "  \n",
    "a refusal": "I'm sorry, but I can't help with that.",
    "a number": "9",
    "a mark": "Score: 9/10",
    "two marks": "success: 9, naturalness: 3",
    "a sentence": "I would give a success of 9 and a naturalness of 3.",
    "a table": "| success | 9 |\n| naturalness | 3 |",
    "XML": "<success>9</success><naturalness>3</naturalness>",
    "YAML": "success: 9\nnaturalness: 3\n",
    "Python": "dict(success=9, naturalness=3)",
    "null": "null",
    "true": "true",
    "a text": '"success 9 naturalness 3"',
    "braces": "{",
    "many braces": "{" * 2000 + "}" * 2000,
    "the wrong way round": "}9{",
    "a long list": "[" * 5000,
    "a zero byte": "\x00",
    "half a surrogate": "\ud800",
}


def read(text: str, finish: str = "stop") -> dict[str, int]:
    return read_scores(Answer(text, finish), CRITERIA)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", GOOD)
def test_marks_are_read_whatever_stands_around_the_object(name: str, around: str) -> None:
    assert read(AROUND[around].format(GOOD[name])) == {"success": 9, "naturalness": 3}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", BAD)
def test_marks_that_are_none_are_refused_whatever_stands_around_them(name: str, around: str) -> None:
    with pytest.raises(BadAnswerError):
        read(AROUND[around].format(BAD[name]))


@pytest.mark.parametrize("around", BREAKS)
def test_of_several_objects_none_is_chosen(around: str) -> None:
    with pytest.raises(BadAnswerError):
        read(BREAKS[around].format(GOOD["in order"]))


@pytest.mark.parametrize("name", NEVER)
def test_what_is_no_object_is_refused(name: str) -> None:
    with pytest.raises(BadAnswerError):
        read(NEVER[name])


@pytest.mark.parametrize("finish", ["length", "content_filter", "tool_calls", "None", ""])
def test_a_whole_object_in_an_answer_that_did_not_end_is_refused(finish: str) -> None:
    with pytest.raises(BadAnswerError):
        read(GOOD["in order"], finish)


@pytest.mark.parametrize("mark", range(11))
def test_every_mark_of_the_scale_is_read(mark: int) -> None:
    assert read(json.dumps({"success": mark, "naturalness": 10 - mark})) == {"success": mark, "naturalness": 10 - mark}


@pytest.mark.parametrize(
    ("chances", "value"),
    [
        ({"Yes": 1.0}, 1.0),
        ({"No": 1.0}, 0.0),
        ({"Yes": 0.6, "No": 0.2}, 0.75),
        ({"yes": 0.2, "Yes": 0.2, "YES": 0.2, "no": 0.2}, 0.75),
        ({" Yes": 0.3, "\u2581yes": 0.3, "\u0120YES": 0.1, "\n\nNo": 0.1}, 0.875),
        ({"Yes": 0.4, "Yesterday": 0.1, "yes.": 0.1, "No": 0.4}, 0.5),
        ({"Yes": 0.4, "not": 0.1, "None": 0.1, "No": 0.4}, 0.5),
        ({"Yes": 0.3, "Not": 0.2, "No": 0.3, "Y": 0.1, "N": 0.1}, 0.5),
        ({"Yes": 0.45, "No": 0.05}, 0.9),
        ({"Yes": 0.44, "No": 0.05}, None),
        ({"Yes": 0.05, "The": 0.95}, None),
        ({"y": 0.5, "n": 0.5}, None),
        ({"oui": 1.0}, None),
        ({"true": 0.9, "false": 0.1}, None),
        ({"1": 0.9, "0": 0.1}, None),
        ({"<think>": 1.0}, None),
        ({"": 1.0}, None),
        ({"Yes": 0.9, "No": 0.9}, None),
        ({}, None),
    ],
)
def test_yes_is_held_against_no_and_against_nothing_else(chances: Mapping[str, float], value: float | None) -> None:
    first = [(token, math.log(chance)) for token, chance in chances.items()]
    if value is None:
        with pytest.raises(JudgeError):
            yes_probability(first, 0.5)
    else:
        assert yes_probability(first, 0.5)[0] == pytest.approx(value)


@pytest.mark.parametrize(
    ("chances", "said", "value"),
    [
        ({"7": 1.0}, "7", 7.0),
        ({"7": 0.5, "8": 0.5}, "8", 7.5),
        ({"0": 0.9}, "0", 0.0),
        ({" 9": 0.5, "\u01203": 0.25}, "9", 7.0),
        ({"5": 0.5, "five": 0.5}, "5", 5.0),
        ({"5": 0.4, "five": 0.5}, "5", None),
        ({"1": 0.9}, "10", None),
        ({"1": 0.9}, "1.", 1.0),
        ({"1": 0.9}, "1/", 1.0),
        ({"10": 0.9}, "10", None),
        ({"-": 0.9, "3": 0.1}, "-", None),
        ({"9": 0.3, "½": 0.7}, "½", None),
        ({"٣": 0.9}, "٣", None),
        ({"Score": 1.0}, "Score", None),
        ({}, "7", None),
    ],
)
def test_digits_are_weighed_and_nothing_is_made_of_anything_else(
    chances: Mapping[str, float], said: str, value: float | None
) -> None:
    answer = Answer(said, "length", tuple((token, math.log(chance)) for token, chance in chances.items()))
    if value is None:
        with pytest.raises(JudgeError):
            expected_digit(answer, 0, 9, 0.5)
    else:
        assert expected_digit(answer, 0, 9, 0.5)[0] == pytest.approx(value)


@pytest.mark.parametrize(
    ("ranking", "order"),
    [
        ("[1, 2, 3]", (0, 1, 2)),
        ("[3, 1, 2]", (2, 0, 1)),
        ("[1, 2]", None),
        ("[1, 2, 3, 4]", None),
        ("[0, 1, 2]", None),
        ("[1, 1, 2]", None),
        ("[1, 2, 3.0]", None),
        ('["1", "2", "3"]', None),
        ("[1, 2, true]", None),
        ("[[1, 2, 3]]", None),
        ("[]", None),
        ("null", None),
        ("123", None),
        ('"1 > 2 > 3"', None),
        ('{"1": 1, "2": 2, "3": 3}', None),
    ],
)
def test_a_ranking_holds_everybody_once(ranking: str, order: tuple[int, ...] | None) -> None:
    answer = Answer(f'{{"reasoning": "first 3, then 1", "ranking": {ranking}}}', "stop")
    if order is None:
        with pytest.raises(BadAnswerError):
            read_ranking(answer, 3)
    else:
        assert read_ranking(answer, 3) == order


def message(content: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (message("{}"), "{}"),
        (message(None), ""),
        (message([{"type": "text", "text": "9"}]), ""),
        (message(9), ""),
        ({"choices": [{"message": {}}]}, ""),
        ({"choices": [{"text": "9"}]}, None),
        ({"choices": []}, None),
        ({"choices": {}}, None),
        ({"choices": None}, None),
        ({"output": "9"}, None),
        ([], None),
        ([message("9")], None),
        ("9", None),
        (9, None),
        (None, None),
        (True, None),
    ],
)
def test_what_a_server_sends_is_a_chat_completion_or_an_error(payload: Any, text: str | None) -> None:
    if text is None:
        with pytest.raises(JudgeError):
            read_answer(payload)
    else:
        assert read_answer(payload).text == text


class Saying(Client):
    """A client whose judge answers as given, without a server."""

    def __init__(self) -> None:
        super().__init__(Server(url="http://127.0.0.1:9", model="nobody", concurrency=1))
        self.answer = Answer("", "stop")

    def chat(self, messages: Sequence[Mapping[str, Any]], max_tokens: int, **settings: Any) -> Answer:
        return self.answer


PIECES = [
    *("{", "}", "[", "]", '"', ":", ",", "\\", "\n", " ", "-", ".", "0", "1", "7", "10", "11", "1e1", "9" * 400),
    *(
        "null",
        "true",
        "NaN",
        "yes",
        "no",
        "Yes",
        "Score:",
        "```json",
        "<think>",
        "</think>",
        "\x00",
        "\ud800",
        "½",
        "९",
    ),
    *(
        '"success"',
        '"naturalness"',
        '"ranking"',
        '"reasoning"',
        '"success": 9',
        '"naturalness": 3',
        '"ranking": [2, 1]',
    ),
]


def any_text(chance: random.Random) -> str:
    """A piece of something, or an answer with characters left out, put in or exchanged."""
    if chance.random() < 0.5:
        return "".join(chance.choices(PIECES, k=chance.randint(0, 12)))
    text = list(chance.choice([*GOOD.values(), *BAD.values(), '{"reasoning": "", "ranking": [2, 1]}']))
    for _ in range(chance.randint(0, 3)):
        at = chance.randrange(len(text) + 1)
        text[at : at + chance.randint(0, 2)] = chance.choice([[], [chance.choice(PIECES)]])
    return "".join(text)


def any_logprob(chance: random.Random) -> float:
    return chance.choice([0.0, -0.1, -0.7, -2.0, -9999.0, -math.inf, math.inf, math.nan, 0.5, 1e300])


def test_whatever_a_judge_writes_is_unavailable_or_what_it_wrote() -> None:
    chance, client = random.Random(0), Saying()
    judges = [
        YesNoReward(client),
        ExpectedScoreReward(client, criteria=CRITERIA),
        RubricReward(client, criteria=CRITERIA),
        RankingReward(client, min_agreement=0),
        ChecklistReward(client),
        PairwiseReward(client),
    ]
    row = {"questions": ["Is it a cat?", "Is it red?"]}
    pair = [Sample(name, "g", "a cat", (Image.new("RGB", (4, 4), name),), row=row) for name in ("red", "blue")]
    seen = {judge.name: set[str]() for judge in judges}
    for _ in range(600):
        text = any_text(chance)
        tokens = chance.choices(PIECES, k=chance.randint(0, 4))
        first = tuple((token, any_logprob(chance)) for token in tokens)
        client.answer = Answer(text, chance.choice(["stop", "stop", "stop", "length", "content_filter"]), first)
        for judge in judges:
            for score in judge.score(pair):
                seen[judge.name].add(score.status)
                assert score.status in ("ok", "unavailable")
                if score.value is None:
                    assert score.status == "unavailable" and score.reason and not score.parts
                    continue
                assert 0 <= score.value <= 1 and all(math.isfinite(part) for part in score.parts.values())
                if judge.name == "rubric":  # no mark that does not stand there
                    for part in ("success", "naturalness"):
                        assert re.search(rf'"{part}"\s*:\s*-?{round(10 * score.parts[part])}\b', text)
    assert all(statuses == {"ok", "unavailable"} for statuses in seen.values()), seen
