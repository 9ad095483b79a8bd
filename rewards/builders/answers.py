"""Rewards that compare what the policy wrote with the row's texts."""

from rewards.base import Reward


def exact_match() -> Reward:
    """Text: 1 where it is one of the row's texts, case and white space apart."""
    from rewards.answers import exact_match

    return exact_match()


def anls(*, threshold: float = 0.5) -> Reward:
    """Text: average normalised Levenshtein similarity to the nearest of the row's texts."""
    from rewards.answers import anls

    return anls(threshold)


def wer() -> Reward:
    """Text: 1 - word error rate to the nearest of the row's texts."""
    from rewards.answers import wer

    return wer()


def bleu() -> Reward:
    """Text: sentence BLEU against the row's texts."""
    from rewards.answers import bleu

    return bleu()


def cider(*, corpus: str) -> Reward:
    """Text: CIDEr-D against the row's texts, rarity by a file of references."""
    from rewards.answers import cider

    return cider(corpus)
