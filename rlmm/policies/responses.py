"""What a stage samples of a policy: an image, a text, or a text and the image it leads to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from rlmm.config.base import nearest
from rlmm.config.sampling import Sampling, Writing
from rlmm.policies.spelling import Spelling
from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Layout
from rollouts.law import COND, SOURCE, UNCOND, Law
from rollouts.trajectory import Span, Trajectory


@dataclass(frozen=True)
class Response:
    """Spans one after the other, and how a prompt is spelled before them."""

    spans: tuple[Span, ...]
    spelling: Spelling

    @property
    def layout(self) -> Layout:
        return self.spelling.layout

    @property
    def law(self) -> Law:
        """The last span's: an image's where one is drawn."""
        return self.spans[-1].law

    @property
    def draws(self) -> bool:
        return self.spans[-1].kind == "image"

    def streams(self, prompt: str, sources: Sequence[Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """What stands before the first span in each stream that a law reads: `cond` sees prompt and sources, `source`
        the sources alone, `uncond` neither. Raises UnusablePrompt."""
        spelling = self.spelling.about(len(sources))
        layout = spelling.layout
        before = layout.prefix if self.spans[0].kind == "image" else layout.question
        prompt_ids = spelling.encode(prompt)
        null = layout.null(prompt_ids)
        streams = {COND: before(prompt_ids, sources), UNCOND: before(null), SOURCE: before(null, sources)}
        return {name: streams[name] for name in self.law.streams()}


def response_of(policy: TransformerPolicy, sampling: Sampling) -> Response:
    """Raises ValueError where a text's stop tokens are unknown."""
    layout, written = policy.layout, sampling.written
    if written is None:
        return Response((sampling.span(layout),), policy.spelling)
    stop = stop_tokens(policy.spelling, written)
    text, draws = written.span(layout, stop), sampling.thought is not None
    spelling = writing_spelling(policy.spelling, written, written.length_limit, draws)
    return Response((text, sampling.span(layout)) if draws else (text,), spelling)


def writing_spelling(spelling: Spelling, writing: Writing, length: int, draws: bool) -> Spelling:
    """How prompts are spelled before text of at most `length` tokens, and whether an image follows it.

    A template of the recipe's own stands after the images, whichever way they enter.
    """
    layout = spelling.layout
    if writing.template is not None:
        seeing = layout.seeing
        own = None if seeing is None else replace(seeing, lead=(), template=writing.template)
        layout = replace(layout, template=writing.template, seeing=own)
    return replace(spelling, layout=layout, text=length, draws=draws)


def stop_tokens(spelling: Spelling, writing: Writing) -> tuple[int, ...]:
    """Ids of the tokens that end a text. ValueError where the policy cannot write one, or they are unknown."""
    if not spelling.layout.decides_text:
        raise ValueError(
            f"checkpoints of family {spelling.layout.family!r} have no head for text, so it cannot write any; leave "
            "thought, answer and the texts of rows out"
        )
    tokenizer = spelling.tokenizer
    if not writing.stop:
        if spelling.layout.text_end is not None:
            return (spelling.layout.text_end,)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token; name the tokens that end a text in `stop`")
        return (int(tokenizer.eos_token_id),)
    vocabulary = tokenizer.get_vocab()
    unknown = [name for name in writing.stop if name not in vocabulary]
    if unknown:
        close = [token for token in vocabulary if token[:1] == unknown[0][:1]][:1000]
        raise ValueError(f"stop names {unknown[0]!r}, which is no token.{nearest(unknown[0], close)}")
    return tuple(vocabulary[name] for name in writing.stop)


def texts_of(tokenizer: PreTrainedTokenizerBase, trajectory: Trajectory) -> list[str]:
    """What each row's text span says, its stop token left out; empty where there is none."""
    texts = [""] * len(trajectory)
    for index, span in enumerate(trajectory.spans):
        if span.kind == "text":
            said_BS = trajectory.target_mask & (trajectory.span == index)
            said_BS &= ~torch.isin(trajectory.ids, torch.tensor(span.stop, dtype=torch.long))
            texts = [
                str(tokenizer.decode(trajectory.ids[row, said_BS[row]].tolist(), skip_special_tokens=True))
                for row in range(len(trajectory))
            ]
    return texts
