"""What comes back from a judge: the server's payload, and the integers in a JSON answer. Nothing here guesses."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.verifier.errors import BadAnswerError, JudgeError, shown
from rewards.verifier.prompts import HIGHEST, Criterion


@dataclass(frozen=True)
class Answer:
    """One chat completion. `first_token`: the likeliest first tokens and their log-probabilities (nats), empty where
    the server gave none.
    """

    text: str
    finish_reason: str
    first_token: tuple[tuple[str, float], ...] = ()


def dig(value: Any, *path: str | int) -> Any:
    """What stands at the end of a path into parsed JSON, None where there is no such place."""
    for step in path:
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value


def read_answer(payload: Any) -> Answer:
    """The first choice of a chat completion. Raises JudgeError for a payload that is none."""
    message = dig(payload, "choices", 0, "message")
    if not isinstance(message, Mapping):
        raise JudgeError(f"the server's answer holds no choices[0].message: {shown(json.dumps(payload))}")
    content = message.get("content")
    return Answer(
        text=content if isinstance(content, str) else "",
        finish_reason=str(dig(payload, "choices", 0, "finish_reason")),
        first_token=_first_token(dig(payload, "choices", 0, "logprobs", "content", 0, "top_logprobs")),
    )


def _first_token(listed: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(listed, list):
        return ()
    pairs = [(dig(item, "token"), dig(item, "logprob")) for item in listed]
    if not all(isinstance(token, str) and isinstance(logprob, int | float) for token, logprob in pairs):
        raise JudgeError(f"the server's top_logprobs are no pairs of token and logprob: {shown(json.dumps(listed))}")
    return tuple((token, float(logprob)) for token, logprob in pairs)


def read_scores(answer: Answer, criteria: Sequence[Criterion]) -> dict[str, int]:
    """Each criterion's integer, 0 to HIGHEST, by the criterion's part, from an answer that is a JSON object.

    Text around the object is cut off. Raises BadAnswerError for a truncated answer, for one without a JSON object,
    and for a value that is missing, no integer or out of range: none of them is ever clamped or filled in.
    """
    found = _finished(answer)
    scores: dict[str, int] = {}
    for criterion in criteria:
        value = found.get(criterion.key)
        if criterion.key not in found:
            raise BadAnswerError(f"the answer lacks {criterion.key!r}: {shown(answer.text)}")
        if type(value) is not int:  # bool is an int to isinstance
            raise BadAnswerError(f"{criterion.key!r} is {json.dumps(value)}, which is no integer: {shown(answer.text)}")
        if not 0 <= value <= HIGHEST:
            raise BadAnswerError(f"{criterion.key!r} is {value}, outside 0 to {HIGHEST}: {shown(answer.text)}")
        scores[criterion.part] = value
    return scores


def read_ranking(answer: Answer, count: int) -> tuple[int, ...]:
    """The numbers of `count` pictures, from 0, best first, from a JSON object whose `ranking` numbers them from 1.
    Raises BadAnswerError for whatever is no such ranking: a picture twice, one left out, or one that was not shown.
    """
    found = _finished(answer).get("ranking")
    if not isinstance(found, list) or not all(type(number) is int for number in found):
        raise BadAnswerError(f"`ranking` is no list of integers: {shown(answer.text)}")
    if sorted(found) != list(range(1, count + 1)):
        raise BadAnswerError(f"`ranking` does not hold each of 1 to {count} once: {shown(answer.text)}")
    return tuple(number - 1 for number in found)


def reasoning(answer: Answer) -> str:
    """The judge's own words in an answer that was read."""
    said = _json_object(answer.text).get("reasoning")
    return said if isinstance(said, str) else ""


def _finished(answer: Answer) -> dict[str, Any]:
    """The JSON object of an answer that came to its end."""
    if answer.finish_reason != "stop":
        raise BadAnswerError(f"the answer ended with finish_reason {answer.finish_reason!r}: {shown(answer.text)}")
    return _json_object(answer.text)


def _json_object(text: str) -> dict[str, Any]:
    for candidate in (text, text[text.find("{") : text.rfind("}") + 1]):
        try:
            found = json.loads(candidate, object_pairs_hook=_unique)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    raise BadAnswerError(f"the answer is no JSON object: {shown(text)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise BadAnswerError("the answer gives one key twice: " + shown(json.dumps(pairs)))
    return dict(pairs)
