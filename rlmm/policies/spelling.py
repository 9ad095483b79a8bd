"""How a policy spells a prompt, and which prompts it cannot take."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rollouts.contract import Layout

UNKNOWN = "prompt that the tokenizer cannot spell"
TOO_LONG = "prompt too long for the model"


class UnusablePrompt(ValueError):
    """A prompt that a policy cannot take. `reason` is the category it is counted under, the text says why and what to
    do."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Spelling:
    """What of a policy meets a prompt: all but its weights. `positions` is the longest sequence of the model."""

    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    positions: int

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt's text; UnusablePrompt where the tokenizer does not know a character.

        The text is data: a special token spelled in it is spelled out, not obeyed.
        """
        ids = self.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids
        if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in ids:
            raise UnusablePrompt(
                UNKNOWN,
                f"prompt {prompt!r} has characters that the policy's tokenizer does not know: it cannot tell it from "
                "other such prompts: rewrite it, or use a checkpoint whose tokenizer covers them",
            )
        return ids

    def fault(self, prompt: str, sources: int) -> UnusablePrompt | None:
        """Why the policy cannot draw an image for this prompt with that many source images; None where it can."""
        try:
            ids = self.encode(prompt)
        except UnusablePrompt as error:
            return error
        image = self.layout.grid.length
        length = len(self.layout.prefix(ids, [[self.layout.pad] * image] * sources)) + image
        if length <= self.positions:
            return None
        return UnusablePrompt(
            TOO_LONG,
            f"prompt {prompt!r:.200} makes {length} tokens with the image and {sources} source images, and the model "
            f"has {self.positions} positions: shorten it, or raise policy.max_positions",
        )
