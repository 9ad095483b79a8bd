"""From rows of preferences to what the stage learns from; bad ones are left out, counted and named."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from rlmm.codecs import Codec, codec_hash
from rlmm.config.pairs import PairsStage
from rlmm.config.preference import DpoStage, PreferenceData
from rlmm.config.sampling import Writing
from rlmm.data.base import UnusableRow
from rlmm.data.images import ImageReader
from rlmm.data.preferences import (
    IDENTICAL,
    RawPreference,
    RawSide,
    check_columns,
    parse_asked,
    parse_preference,
    with_sources,
)
from rlmm.policies.layout_io import Supervised
from rlmm.policies.responses import stop_tokens, writing_spelling
from rlmm.policies.spelling import Spelling, UnusablePrompt
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.checkpoint import write_json_atomically
from rlmm.train.context import StageContext, image_tokens
from rlmm.train.dpo_source import Item
from rlmm.train.experience import spell_sources
from rlmm.train.preferences import Preference
from rlmm.train.processes import world
from rlmm.train.prompts import reasons
from rlmm.train.tokens import BATCH, ImageTokens

if TYPE_CHECKING:
    from rlmm.data.loading import RawRows

SHORT = "codes shorter than the grid"
FOREIGN = "codes of another codec"
UNWRITTEN = "text for a policy that writes none"
UNSPELLED = "answer that the tokenizer cannot spell"
PAIRS_FILE = "pairs.parquet"
NAMED = 20
"""Bad rows that are named; the first of every reason always is."""


@dataclass
class Read:
    """Usable preferences in the order of their rows; what was left out, by reason, and the first such rows."""

    items: list[Item] = field(default_factory=list)
    excluded: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    unread_turns: int = 0
    """Earlier and system turns of conversations, which no prompt has a place for."""

    def leave_out(self, row: int, reason: str, why: Exception | str) -> None:
        self.excluded[reason] += 1
        if len(self.named) < NAMED or self.excluded[reason] == 1:
            told = str(why)
            self.named.append(f"row {row}: {told if told.startswith(reason) else f'{reason}: {told}'}")


@dataclass(frozen=True)
class Speller:
    """How rows become token ids."""

    tokens: ImageTokens
    spelling: Spelling
    writing: Writing
    asking: Writing | None = None
    """How the question about a picture is written, where pairs of answers are learned from too."""

    def sides(self, row: RawPreference) -> list[Supervised]:
        """The row's sides without their images. Raises UnusablePrompt."""
        return [self._side(row, side) for side in row.sides]

    def _side(self, row: RawPreference, side: RawSide) -> Supervised:
        spelling, text = self.spelling, []
        draws = side.codes is not None or side.image is not None
        if side.text is not None:
            if not spelling.layout.decides_text or spelling.layout.mask is not None:
                raise UnusablePrompt(
                    UNWRITTEN, f"{side.text!r:.60}: this policy (family {spelling.layout.family!r}) draws images alone"
                )
            text = [*self._written(side.text), stop_tokens(spelling, self.writing)[0]]
            spelling = writing_spelling(spelling, self.writing, len(text), draws)
        if (fault := spelling.fault(row.prompt, len(row.sources))) is not None:
            raise fault
        sources = [array("q", ids) for ids in spell_sources(self.tokens, spelling, row.sources)]
        asked = spelling.about(len(sources))
        return Supervised(asked.encode(row.prompt), sources=sources, text=text, lead=asked.layout.lead)

    def _written(self, text: str) -> list[int]:
        try:
            return writing_spelling(self.spelling, Writing(template="{prompt}"), 0, True).encode(text)
        except UnusablePrompt as error:
            raise UnusablePrompt(UNSPELLED, f"{text!r:.60}") from error


def load_items(context: StageContext, policy: TransformerPolicy, codec: Codec) -> list[Item]:
    """The stage's preferences; what was left out is said, and kept in preferences.json of its folder.

    Raises ValueError where too many are bad, or none is left.
    """
    config: DpoStage = context.config
    raw, columns, what = _source(context, config)
    speller = Speller(image_tokens(context, codec, policy), policy.spelling, config.writing, _asking(context, config))
    found = read_preferences(raw, columns, speller)
    record = {"rows": len(raw), "kept": len(found.items), "excluded": dict(found.excluded), "named": found.named}
    record |= {"unread_turns": found.unread_turns}
    if world()[0] == 0:
        speller.tokens.save()
        write_json_atomically(context.folder / "preferences.json", record)
    if found.excluded:
        context.say(f"{what}: {len(found.items)} of {len(raw)} rows, excluded {reasons(found.excluded)}")
    if found.unread_turns:
        context.say(f"{what}: {found.unread_turns} earlier or system turns are in no prompt")
    _judge(found, len(raw), columns.max_excluded_share, what)
    return apart(found.items) if config.loss == "kto" else found.items


def _asking(context: StageContext, config: DpoStage) -> Writing | None:
    """How the questions of `understanding` are written: as the stage says, or else as the pairs stage asked them."""
    if config.understanding is None:
        return None
    if config.understanding.writing is not None:
        return config.understanding.writing
    made = context.recipe.stages.get(config.pairs or "")
    return made.understanding.answer if isinstance(made, PairsStage) and made.understanding else Writing()


def apart(items: Sequence[Item]) -> list[Item]:
    """Pairs as single answers: the chosen one is wanted, the rejected one is not."""
    return [
        (one,) if one.desirable is not None else (Preference((one.sides[side],), desirable=side == 0),)
        for item in items
        for one in item
        for side in range(len(one.sides))
    ]


def _source(context: StageContext, config: DpoStage) -> tuple["RawRows", PreferenceData, str]:
    from rlmm.data.loading import load_raw  # `datasets` takes seconds to import

    if config.data is not None:
        return load_raw(config.data.rows(), config.data.path, config.data.split), config.data, config.data.path
    assert config.pairs is not None, "the config was checked"
    path = context.run.stage(config.pairs) / PAIRS_FILE
    return own_pairs(path), PreferenceData(path=str(path), sources_column="sources"), f"pairs of {config.pairs}"


def check_data(config: PreferenceData) -> None:
    """That preferences from elsewhere are there and have their columns. Raises ValueError."""
    from rlmm.data.loading import load_raw

    raw = load_raw(config.rows(), config.path, config.split)
    check_columns(raw.columns, config, raw.name)
    with_sources(config, raw.columns, raw.name)


def own_pairs(path: Path) -> "RawRows":
    """The rows of a file that a pairs stage wrote."""
    from rlmm.data.loading import RawRows

    table = pq.read_table(path)
    return RawRows(table.to_pylist(), table.column_names, path.parent, str(path))


def read_preferences(raw: "RawRows", config: PreferenceData, speller: Speller) -> Read:
    """Every usable row as an item of its preference, and of that of the answers where they are asked for."""
    check_columns(raw.columns, config, raw.name)
    config = with_sources(config, raw.columns, raw.name)
    codec, found = speller.tokens.codec, Read()
    codec.eval()
    height, width = codec.image_size
    reader = ImageReader(raw.root, (width, height), "RGB" if codec.channels == 3 else "L", config.resize)
    for start in range(0, len(raw), BATCH):
        part = [(row, raw[row]) for row in range(start, min(start + BATCH, len(raw)))]
        found.items += list(_encoded(list(_usable(part, config, reader, speller, found)), speller, found))
    return found


Usable = tuple[int, RawPreference, list[Supervised], list[Preference]]
"""A row's number, what it says, its sides without their images, and the answers that come with it."""


def _usable(
    part: Sequence[tuple[int, Any]], config: PreferenceData, reader: ImageReader, speller: Speller, found: Read
) -> Iterator[Usable]:
    mine = codec_hash(speller.tokens.codec)
    for number, raw in part:
        try:
            row = parse_preference(raw, config, reader)
            _check_codes(row, speller.tokens.codec, mine)
            sides, answers = speller.sides(row), _answers(raw, reader, speller)
        except (UnusableRow, UnusablePrompt) as fault:
            found.leave_out(number, fault.reason, fault)
            continue
        found.unread_turns += row.unread_turns
        yield number, row, sides, answers


def _answers(raw: Any, reader: ImageReader, speller: Speller) -> list[Preference]:
    if speller.asking is None:
        return []
    asked = replace(speller, writing=speller.asking).sides(parse_asked(raw, reader))
    return [Preference(tuple(asked))]


def _check_codes(row: RawPreference, codec: Codec, mine: str) -> None:
    """Raises UnusableRow for codes that the policy's codec did not make."""
    count = codec.grid[0] * codec.grid[1]
    for codes in (side.codes for side in row.sides if side.codes is not None):
        if len(codes) < count:
            raise UnusableRow(SHORT, f"{len(codes)} codes, and the grid has {count}")
        if len(codes) > count or min(codes) < 0 or max(codes) >= codec.num_codes or row.codec not in (None, mine):
            raise UnusableRow(
                FOREIGN,
                f"{len(codes)} codes up to {max(codes)} of codec {row.codec or 'unknown'}; this one is {mine}, with "
                f"{count} codes below {codec.num_codes}",
            )


def _encoded(rows: Sequence[Usable], speller: Speller, found: Read) -> Iterator[Item]:
    """With the codes of images, which may turn out to be the same."""
    images = [side.image for _, row, *_ in rows for side in row.sides if side.image is not None]
    made = iter(speller.tokens.codes(images).tolist() if images else [])
    for number, row, spelled, answers in rows:
        coded = [next(made) if side.image is not None else side.codes for side in row.sides]
        sides = tuple(
            ids if codes is None else replace(ids, image=array("i", codes))
            for ids, codes in zip(spelled, coded, strict=True)
        )
        if len(sides) == 2 and (sides[0].image, list(sides[0].text)) == (sides[1].image, list(sides[1].text)):
            found.leave_out(number, IDENTICAL, f"{IDENTICAL}: their codes are")
            continue
        yield (Preference(sides, row.desirable), *answers)


def _judge(found: Read, rows: int, limit: float, what: str) -> None:
    out = found.excluded.total()
    if found.items and out <= limit * rows:
        return
    why = f"more than max_excluded_share {limit}" if found.items else "none is left"
    raise ValueError(
        f"{what}: {out} of {rows} preferences are bad ({reasons(found.excluded) or 'there are no rows'}), {why}. "
        f"First: {'; '.join(found.named[:5]) or 'none'}. Mend the rows" + (" or raise it" if found.items else "")
    )
