"""Scoring of generated samples. Importing this package imports no model, no torch and no OCR engine."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from rewards.base import Reward, Sample, Score
from rewards.builders import answers, judges, models, own, pictures
from rewards.names import nearest
from rewards.plugins import plugins, target_of

REWARDS: dict[str, Callable[..., Reward]] = {
    "ocr": pictures.ocr,
    "tesseract": pictures.tesseract,
    "letter_forms": pictures.letter_forms,
    "scenes": pictures.scenes,
    "not_blank": pictures.not_blank,
    "edge_density": pictures.edge_density,
    "colour_entropy": pictures.colour_entropy,
    "jpeg_size": pictures.jpeg_size,
    "distinct": pictures.distinct,
    "no_painted_text": pictures.no_painted_text,
    "changed": pictures.changed,
    "clip_score": models.clip_score,
    "siglip": models.siglip,
    "pickscore": models.pickscore,
    "hpsv2": models.hpsv2,
    "image_reward": models.image_reward,
    "aesthetic": models.aesthetic,
    "objects": models.objects,
    "yes_no": judges.yes_no,
    "checklist": judges.checklist,
    "expected_score": judges.expected_score,
    "rubric": judges.rubric,
    "target_match": judges.target_match,
    "viescore": judges.viescore,
    "pairwise": judges.pairwise,
    "ranking": judges.ranking,
    "exact_match": answers.exact_match,
    "anls": answers.anls,
    "wer": answers.wer,
    "bleu": answers.bleu,
    "cider": answers.cider,
    "remote": own.remote,
    "function": own.function,
}
"""Every built-in reward by name. An entry's keyword arguments are the reward's options; its docstring's first line
says what it does.
"""


def check_options(name: str, options: Sequence[str]) -> None:
    """Raises ValueError, naming the nearest, for an unknown reward or an option that the reward does not take. The
    options of another package's reward are looked at when it is built.
    """
    if name not in REWARDS:
        others = plugins(REWARDS)
        if name in others:
            return
        raise ValueError(f"there is no reward {name!r}. {nearest(name, [*REWARDS, *others])}")
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
    """Makes a reward by its name, built-in or another package's. Raises ValueError for an unknown name or option, and
    what the reward's own constructor raises (a missing model file, a server that does not answer, an optional package
    that is not installed).
    """
    check_options(name, list(options))
    if name not in REWARDS:
        return own.function(target=target_of(plugins(REWARDS)[name]), name=name, **options)
    return REWARDS[name](**options)


__all__ = ["REWARDS", "Reward", "Sample", "Score", "build", "check_options"]
