"""Scoring of generated samples. Importing this package imports no model, no torch and no OCR engine."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rewards.base import Reward, Sample, Score
from rewards.names import nearest


def _ocr(
    *,
    case_sensitive: bool = False,
    text_column: str | None = None,
    model: str | None = None,
    height: int = 48,
    width_scale: float = 1.0,
    characters: str | None = None,
    batch_size: int = 8,
    threads: int = 1,
) -> Reward:
    """Text in the image, read by PP-OCR, against the prompt's quoted text."""
    from rewards.ocr import OcrReward
    from rewards.paddle import PaddleReader

    reader = PaddleReader(
        model=model,
        height=height,
        width_scale=width_scale,
        characters=characters,
        batch_size=batch_size,
        threads=threads,
    )
    return OcrReward(reader, name="ocr", case_sensitive=case_sensitive, text_column=text_column)


def _tesseract(
    *,
    case_sensitive: bool = False,
    text_column: str | None = None,
    language: str = "eng",
    tessdata: str | None = None,
    characters: str | None = None,
) -> Reward:
    """Text in the image, read by Tesseract, against the prompt's quoted text."""
    from rewards.ocr import OcrReward
    from rewards.tesseract import TesseractReader

    reader = TesseractReader(language=language, tessdata=tessdata, characters=characters)
    return OcrReward(reader, name="tesseract", case_sensitive=case_sensitive, text_column=text_column)


def _scenes() -> Reward:
    """Counted coloured shapes and their relation, checked exactly; also edits."""
    from rewards.scenes import ScenesReward

    return ScenesReward()


def _not_blank() -> Reward:
    """1 for a picture that shows something, 0 for a blank one."""
    from rewards.guards import not_blank

    return not_blank()


def _edge_density() -> Reward:
    """Share of pixels at an edge; for a gate, or clipped by a transform."""
    from rewards.guards import edges

    return edges()


def _colour_entropy() -> Reward:
    """Entropy of the colours in bits; for a gate, or clipped by a transform."""
    from rewards.guards import colours

    return colours()


def _judge(*server: Any, check: bool) -> Any:
    """A client of a judge's server, asked first whether it serves the model."""
    from rewards.verifier.client import Client
    from rewards.verifier.server import Server

    client = Client(Server(*server))
    if check:
        client.check()
    return client


def _yes_no(
    *,
    url: str,
    model: str,
    questions: Sequence[Mapping[str, Any]] | None = None,
    combine: Literal["geometric", "mean"] = "geometric",
    min_mass: float = 0.5,
    top_logprobs: int = 20,
    check: bool = True,
    api_key_env: str = "",
    timeout_s: float = 60.0,
    retries: int = 3,
    backoff_s: float = 0.5,
    concurrency: int = 16,
    extra_body: Mapping[str, Any] | None = None,
) -> Reward:
    """A served multimodal model's probability of yes to questions about the image."""
    from rewards.verifier.yes_no import YesNoReward, read_questions

    asked = read_questions(questions)  # a question that will not do is told before any server is asked
    server = (url, model, api_key_env, timeout_s, retries, backoff_s, concurrency, extra_body or {})
    client = _judge(*server, check=check)
    return YesNoReward(client, questions=asked, combine=combine, min_mass=min_mass, top_logprobs=top_logprobs)


def _viescore(
    *,
    url: str,
    model: str,
    max_tokens: int = 512,
    check: bool = True,
    api_key_env: str = "",
    timeout_s: float = 60.0,
    retries: int = 3,
    backoff_s: float = 0.5,
    concurrency: int = 16,
    extra_body: Mapping[str, Any] | None = None,
) -> Reward:
    """A served multimodal model's VIEScore: what was asked for, and how it looks."""
    from rewards.verifier.viescore import VieScoreReward

    server = (url, model, api_key_env, timeout_s, retries, backoff_s, concurrency, extra_body or {})
    client = _judge(*server, check=check)
    return VieScoreReward(client, max_tokens=max_tokens)


def _exact_match() -> Reward:
    """Text: 1 where it is one of the row's texts, case and white space apart."""
    from rewards.answers import exact_match

    return exact_match()


def _anls(*, threshold: float = 0.5) -> Reward:
    """Text: average normalised Levenshtein similarity to the nearest of the row's texts."""
    from rewards.answers import anls

    return anls(threshold)


def _wer() -> Reward:
    """Text: 1 - word error rate to the nearest of the row's texts."""
    from rewards.answers import wer

    return wer()


def _bleu() -> Reward:
    """Text: sentence BLEU against the row's texts."""
    from rewards.answers import bleu

    return bleu()


def _cider(*, corpus: str) -> Reward:
    """Text: CIDEr-D against the row's texts, rarity by a file of references."""
    from rewards.answers import cider

    return cider(corpus)


def _function(*, target: str, name: str = "", **options: Any) -> Reward:
    """Your own Python function, path/file.py:name or module:name."""
    from rewards.functions import FunctionReward

    return FunctionReward(target, name=name, options=options)


REWARDS: dict[str, Callable[..., Reward]] = {
    "ocr": _ocr,
    "tesseract": _tesseract,
    "scenes": _scenes,
    "not_blank": _not_blank,
    "edge_density": _edge_density,
    "colour_entropy": _colour_entropy,
    "yes_no": _yes_no,
    "viescore": _viescore,
    "exact_match": _exact_match,
    "anls": _anls,
    "wer": _wer,
    "bleu": _bleu,
    "cider": _cider,
    "function": _function,
}
"""Every reward by name. An entry's keyword arguments are the reward's options; its docstring's first line
says what it does.
"""


def check_options(name: str, options: Sequence[str]) -> None:
    """Raises ValueError, naming the nearest, for an unknown reward or an option that the reward does not
    take.
    """
    if name not in REWARDS:
        raise ValueError(f"there is no reward {name!r}. {nearest(name, REWARDS)}")
    parameters = inspect.signature(REWARDS[name]).parameters.values()
    known = [item.name for item in parameters if item.kind is item.KEYWORD_ONLY]
    required = [item.name for item in parameters if item.kind is item.KEYWORD_ONLY and item.default is item.empty]
    if missing := [option for option in required if option not in options]:
        raise ValueError(f"reward {name!r} needs the option {missing[0]!r}")
    if any(item.kind is item.VAR_KEYWORD for item in parameters):
        return
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "It takes none."
            raise ValueError(f"reward {name!r} has no option {option!r}. {hint}")


def build(name: str, /, **options: Any) -> Reward:
    """Makes a reward by its name in REWARDS. Raises ValueError for an unknown name or option, and what the
    reward's own constructor raises (a missing model file, a server that does not answer, an optional package
    that is not installed).
    """
    check_options(name, list(options))
    return REWARDS[name](**options)


__all__ = ["REWARDS", "Reward", "Sample", "Score", "build", "check_options"]
