"""Answers that are one token: what probability the judge gave each of the words that it may answer.

There is no text to parse, and the score is continuous (VQAScore, Lin et al. 2024, arXiv 2404.01291). Unlike there the
probabilities are divided by what all allowed answers have together, over all their spellings, and are refused where
that is little: then the judge is not answering the question.
"""

import math
from collections.abc import Mapping, Sequence

from rewards.verifier.answers import Answer
from rewards.verifier.client import Client
from rewards.verifier.errors import JudgeError, shown
from rewards.verifier.prompts import YES_OR_NO, messages
from rewards.verifier.views import View

SLACK = 1e-3
"""By how much rounding may lift a log-probability above 0 (nats), or a sum of probabilities above 1."""
SPACES = " \t\n\u2581\u0120"
"""Blanks before a word, and the characters that SentencePiece and byte-level tokenizers write for them."""


def check_settings(min_mass: float, top_logprobs: int) -> None:
    """Raises ValueError for settings with which no answer could be read."""
    if not 0 < min_mass <= 1:
        raise ValueError(f"min_mass is a probability above 0 and at most 1, got {min_mass}")
    if not 2 <= top_logprobs <= 20:
        raise ValueError(f"top_logprobs must be 2 to 20, the format's own limit, got {top_logprobs}")


def first_token(answer: Answer) -> Sequence[tuple[str, float]]:
    """The first token's log-probabilities. Raises JudgeError for an answer that ended otherwise than by a stop or by
    the length that was asked for."""
    if answer.finish_reason not in ("stop", "length"):
        raise JudgeError(f"the answer ended with finish_reason {answer.finish_reason!r}: {shown(answer.text)}")
    return answer.first_token


def shares(
    first: Sequence[tuple[str, float]], allowed: Sequence[str], min_mass: float, what: str
) -> tuple[dict[str, float], float]:
    """(share, mass): mass is the probability of all spellings of the allowed answers, share what each of them has of
    it, summing to 1.

    `first` holds tokens and their log-probabilities (nats). `allowed` are the answers, casefolded; `what` is what
    errors call them together. Raises JudgeError where there are no log-probabilities, where they are none, and where
    the mass is below `min_mass`.
    """
    if not first:
        raise JudgeError(f"the server gave no log-probabilities of the first token, in which {what} are looked for")
    masses: Mapping[str, list[float]] = {answer: [] for answer in allowed}
    for token, logprob in dict.fromkeys(first):  # some servers list the sampled token twice
        if not logprob <= SLACK:
            raise JudgeError(f"the server gave {token!r} a log-probability of {logprob}")
        masses.get(token.lstrip(SPACES).casefold(), []).append(math.exp(logprob))
    found = {answer: math.fsum(chances) for answer, chances in masses.items()}
    mass = math.fsum(found.values())
    if mass > 1 + SLACK:
        raise JudgeError(f"the server's probabilities of {what} add up to {mass:.3f}, above 1")
    if mass < min_mass:
        likeliest = sorted(first, key=lambda pair: -pair[1])[:3]
        listed = ", ".join(f"{token!r} {math.exp(logprob):.3f}" for token, logprob in likeliest)
        raise JudgeError(
            f"{what} have a probability of {mass:.3f} together, below min_mass {min_mass}; likeliest: {listed}. "
            "A judge that thinks first needs extra_body: {chat_template_kwargs: {enable_thinking: false}}"
        )
    return {answer: chance / mass for answer, chance in found.items()}, mass


def yes_probability(first: Sequence[tuple[str, float]], min_mass: float) -> tuple[float, float]:
    """(p, mass): p is the share that yes has of the mass of yes and no. Raises as `shares` does."""
    share, mass = shares(first, ("yes", "no"), min_mass, "yes and no")
    return share["yes"], mass


def yes_no_task(ask: str) -> str:
    """A question, with the form of its answer."""
    return f"{ask}\n{YES_OR_NO}"


def ask_yes_no(client: Client, view: View, ask: str, top_logprobs: int, min_mass: float) -> tuple[float, float]:
    """(p, mass) of one question about a sample. Raises JudgeError."""
    asked = messages(view, yes_no_task(ask))
    answer = client.chat(asked, 1, logprobs=True, top_logprobs=top_logprobs)
    return yes_probability(first_token(answer), min_mass)


def expected_digit(answer: Answer, lowest: int, highest: int, min_mass: float) -> tuple[float, float]:
    """(E, mass): the mean of the digits from `lowest` to `highest` under the judge's probabilities (E = sum k p(k) /
    sum p(k)), and the probability that they have together.

    Raises JudgeError as `shares` does, and for an answer that goes on with another digit: a tokenizer that parts
    numbers into digits makes a 10 begin with a 1.
    """
    first = first_token(answer)
    digits = [str(digit) for digit in range(lowest, highest + 1)]
    share, mass = shares(first, digits, min_mass, f"the digits {lowest} to {highest}")
    said = answer.text.strip()
    if len(said) > 1 and said[:2].isdecimal():
        raise JudgeError(f"the answer {shown(said)} is a number of several digits; asked was {lowest} to {highest}")
    return math.fsum(int(digit) * chance for digit, chance in share.items()), mass
