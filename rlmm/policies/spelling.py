"""How a policy spells a prompt, and which prompts it cannot take."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from rollouts.contract import Layout

UNKNOWN = "prompt that the tokenizer cannot spell"
TOO_LONG = "prompt too long for the model"
NO_SOURCES = "source image for a family that draws from text alone"


class UnusablePrompt(ValueError):
    """A prompt that a policy cannot take. `reason` is the category it is counted under, the text says why and what to
    do."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Spelling:
    """What of a policy meets a prompt: all but its weights. `positions` is the longest sequence of the model; `text`:
    the most tokens that it writes after the prompt, and `draws`: whether an image follows."""

    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    positions: int
    text: int = 0
    draws: bool = True

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt's text; UnusablePrompt where the tokenizer does not know a character.

        The text is data: a special token spelled in it is spelled out, not obeyed. Those of the template are obeyed.
        """
        pieces = [(piece, self._ids(piece, prompt)) for piece in self._pieces]
        # A template may name that very token: phi's is the one that begins and ends a text.
        if any(self.tokenizer.unk_token_id in ids for piece, ids in pieces if isinstance(piece, str)):
            raise UnusablePrompt(
                UNKNOWN,
                f"prompt {prompt!r} has characters that the policy's tokenizer does not know: it cannot tell it from "
                "other such prompts: rewrite it, or use a checkpoint whose tokenizer covers them",
            )
        return [token for _, ids in pieces for token in ids]

    @cached_property
    def _pieces(self) -> list[str | int]:
        """The template, cut at its special tokens: ids of these, and text between them."""
        template = self.layout.template
        special = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        found = sorted((token for token in special if token in template), key=len, reverse=True)
        texts = re.split(f"({'|'.join(map(re.escape, found))})", template) if found else [template]
        vocabulary = self.tokenizer.get_vocab() if found else {}
        return [vocabulary[text] if text in found else text for text in texts if text]

    def _ids(self, piece: str | int, prompt: str) -> list[int]:
        if isinstance(piece, int):
            return [piece]
        text = piece.replace("{prompt}", prompt)
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    @property
    def sees(self) -> bool:
        """Whether source images are seen through an encoder: before a text, by families that have one."""
        return self.layout.seeing is not None and self.text > 0

    def about(self, sources: int) -> "Spelling":
        """How a prompt with that many source images is spelled."""
        return self._about_seen if sources and self.sees else self

    @cached_property
    def _about_seen(self) -> "Spelling":
        seeing = self.layout.seeing
        assert seeing is not None, "asked for where images are seen"
        return replace(self, layout=replace(self.layout, template=seeing.template, lead=seeing.lead))

    def length(self, ids: Sequence[int], sources: int) -> int:
        """Positions of a whole sequence: a prompt's ids with what stands around them, the source images, text at its
        longest, the image."""
        image, seeing = self.layout.grid.length, self.layout.seeing
        source = [self.layout.pad] * (seeing.length if seeing is not None and self.sees else image)
        layout = self.about(sources).layout
        drawn = self.draws * (len(layout.boi) + image)
        return len(layout.question(ids, [source] * sources)) + self.text + drawn

    def fault(self, prompt: str, sources: int) -> UnusablePrompt | None:
        """Why the policy cannot answer this prompt with that many source images; None where it can."""
        try:
            ids = self.about(sources).encode(prompt)
        except UnusablePrompt as error:
            return error
        if sources and not self.layout.takes_sources:
            return UnusablePrompt(
                NO_SOURCES,
                f"prompt {prompt!r:.200} has {sources} source images, and family {self.layout.family!r} draws from "
                "text alone here: use rows without them, or a family that edits (emu3, chameleon, janus, "
                "glm_image_edit)",
            )
        if (length := self.length(ids, sources)) <= self.positions:
            return None
        what = "the image" if self.draws else "the answer"
        return UnusablePrompt(
            TOO_LONG,
            f"prompt {prompt!r:.200} makes {length} tokens with {what} and {sources} source images, and the model "
            f"has {self.positions} positions: shorten it, or raise policy.max_positions (or "
            "engine.max_length, where that is less)",
        )
