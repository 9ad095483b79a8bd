"""From rows to what SFT learns from: spelled prompts and texts, and the codes of images."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rlmm.codecs import Codec
from rlmm.config.sampling import Writing
from rlmm.data import Dataset, Example
from rlmm.data.base import Subset
from rlmm.policies.layout_io import Supervised
from rlmm.policies.responses import stop_tokens, writing_spelling
from rlmm.policies.spelling import Spelling, UnusablePrompt
from rlmm.train.context import StageContext, load_rows
from rlmm.train.experience import spell_sources
from rlmm.train.prompts import reasons
from rlmm.train.tokens import BATCH, ImageTokens


def first_rows(data: Dataset, count: int | None) -> Dataset:
    """The first `count` rows; ValueError where there are fewer."""
    if count is None:
        return data
    if count > len(data):
        raise ValueError(f"images: {count} asks for more than the {len(data)} pairs there are; lower it")
    return Subset(data, range(count), data.excluded)


def understanding_rows(context: StageContext, tokens: ImageTokens, spelling: Spelling) -> list[Supervised]:
    """The training rows of the recipe's `understanding`, asked as they are when it is measured."""
    asked = context.recipe.understanding
    assert asked is not None, "the recipe was checked"
    writing = Writing(template=asked.answer.template, stop=asked.answer.stop)
    rows, left_out = encode_rows(tokens, spelling, writing, load_rows(context, asked.data, "train", spelling))
    if left_out:
        context.say(f"understanding data: {left_out.total()} rows are not learnt from ({reasons(left_out)})")
    return rows


NOTHING = "no target image and no text"


def encode_rows(
    tokens: ImageTokens, spelling: Spelling, writing: Writing, data: Dataset
) -> tuple[list[Supervised], Counter[str]]:
    """Every row that has a target image or a text, spelled; and the number of rows left out, by reason. ValueError
    where none is left."""
    found: list[Supervised] = []
    excluded: Counter[str] = Counter()
    tokens.codec.eval()
    for start in range(0, len(data), BATCH):
        rows = [data[i] for i in range(start, min(start + BATCH, len(data)))]
        found += _encoded(tokens, spelling, writing, rows, excluded)
    if not found:
        raise ValueError(
            f"none of the {len(data)} training rows can be learnt from ({reasons(excluded)}). SFT needs a target image "
            "or a text: name the column in data.target_column, data.codes_column or data.text_column"
        )
    return found, excluded


def _encoded(
    tokens: ImageTokens, spelling: Spelling, writing: Writing, rows: Sequence[Example], excluded: Counter[str]
) -> list[Supervised]:
    spelled: list[tuple[Example, Supervised]] = []
    for row in rows:
        try:
            spelled.append((row, _spelled(tokens, spelling, writing, row)))
        except UnusablePrompt as fault:
            excluded[fault.reason] += 1
    pictured = [row.target for row, _ in spelled if row.codes is None and row.target is not None]
    made = iter(tokens.codes(pictured).tolist() if pictured else [])
    found = []
    for row, ids in spelled:
        codes = next(made) if row.codes is None and row.target is not None else row.codes
        found.append(ids if codes is None else replace(ids, image=array("i", checked(codes, tokens.codec))))
    return found


def checked(codes: Sequence[int], codec: Codec) -> Sequence[int]:
    """Codes that a row brought. ValueError where they are not of the codec."""
    count = codec.tokens
    if len(codes) != count or min(codes) < 0 or max(codes) >= codec.num_codes:
        raise ValueError(
            f"a row of data.codes_column has {len(codes)} codes from {min(codes, default=0)} to "
            f"{max(codes, default=0)}, and this codec makes {count} from 0 to {codec.num_codes - 1}: they are "
            "another's; tokenise the images again"
        )
    return codes


def _spelled(tokens: ImageTokens, spelling: Spelling, writing: Writing, row: Example) -> Supervised:
    """A row without its image. Raises UnusablePrompt."""
    draws, text = row.target is not None or row.codes is not None, []
    if row.texts:
        # The text is plain text: no template stands around it.
        plain = writing_spelling(spelling, Writing(template="{prompt}"), 0, True)
        text = [*plain.encode(row.texts[0]), stop_tokens(spelling, writing)[0]]
        spelling = writing_spelling(spelling, writing, len(text), draws)
    elif not draws:
        raise UnusablePrompt(NOTHING, f"prompt {row.prompt!r:.200} leads to nothing")
    if (fault := spelling.fault(row.prompt, len(row.sources))) is not None:
        raise fault
    sources = [array("q", ids) for ids in spell_sources(tokens, spelling, row.sources)]
    asked = spelling.about(len(sources))
    return Supervised(asked.encode(row.prompt), sources=sources, text=text, lead=asked.layout.lead)
