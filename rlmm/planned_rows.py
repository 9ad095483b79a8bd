"""How long the sequences of a stage are, for its memory plan: the longest that the first rows of its data spell."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from rlmm.config.pairs import Asked, PairsStage
from rlmm.config.preference import DpoStage
from rlmm.config.recipe import Recipe
from rlmm.config.sampling import Sampling, Writing
from rlmm.config.stages import GrpoStage, PolicyStage, SftStage
from rlmm.planned_data import ASSUMED, Read, Shown, read_data, read_preferences
from rlmm.policies.responses import writing_spelling
from rlmm.policies.spelling import Spelling, UnusablePrompt


@dataclass(frozen=True)
class Row:
    """Positions of a sequence: all of them, those of its prompt's text, and those of the text after it. image: whether
    one ends it."""

    length: int
    prompt: int
    text: int = 0
    image: bool = True


@dataclass(frozen=True)
class Rows:
    """The longest row of a stage, and that of the answers about pictures that it learns beside. `assumed`: what is
    taken of prompts that could not be read, and why."""

    own: Row
    beside: Row | None = None
    assumed: str = ""
    data: Read = field(default=Read(), compare=False)
    """What they are of."""


def rows_of(recipe: Recipe, stage: PolicyStage, spelling: Spelling, data: Read) -> Rows:
    """Of a policy stage; `data`: the recipe's own."""
    if isinstance(stage, GrpoStage):
        return _sampled(data, spelling, stage.sampling, stage.sampling.written)
    if isinstance(stage, DpoStage):
        return _preferred(recipe, stage, spelling, data)
    assert isinstance(stage, SftStage), "no other stage trains a policy"
    made = _taught(data, spelling, stage.writing, spelling.layout.decides_text)
    if recipe.understanding is None or not stage.understanding_share:
        return made
    asked = recipe.understanding
    beside = _taught(read_data(asked.data, recipe.seed), spelling, asked.answer, True)
    return replace(made, beside=beside.own, assumed=made.assumed or beside.assumed)


def _sampled(data: Read, spelling: Spelling, sampling: Sampling, writing: Writing | None) -> Rows:
    """Of samples; text at its longest."""
    text = 0 if sampling.written is None else sampling.written.length_limit
    shown = [replace(one, text="", image=sampling.answer is None) for one in data.shown]
    return _longest(shown, data, spelling, writing or Writing(), text, sampling.answer is None)


def _taught(data: Read, spelling: Spelling, writing: Writing, writes: bool) -> Rows:
    """Of what rows hold. A run leaves out those that lead to nothing, and texts where the policy writes none."""
    shown = [one for one in data.shown if (one.text and writes) or (one.image and not one.text)]
    return _longest(shown, data, spelling, writing, 0, True)


def _preferred(recipe: Recipe, stage: DpoStage, spelling: Spelling, data: Read) -> Rows:
    if stage.data is not None:
        writes = spelling.layout.decides_text and spelling.layout.mask is None
        return _taught(read_preferences(stage.data), spelling, stage.writing, writes)
    pairs = recipe.stages[stage.pairs or ""]
    assert isinstance(pairs, PairsStage), "the recipe was checked"
    drawn = pairs if pairs.rollouts is None else recipe.stages[pairs.rollouts]
    assert isinstance(drawn, PairsStage | GrpoStage), "the recipe was checked"
    made = _sampled(data, spelling, drawn.sampling, stage.writing)
    if stage.understanding is None or pairs.understanding is None:
        return made
    return replace(made, beside=_answered(pairs.understanding, spelling, stage.understanding.writing))


def _answered(asked: Asked, spelling: Spelling, writing: Writing | None) -> Row:
    """Of a question about a picture."""
    shown = Shown(asked.question, sources=1, image=False)
    return _row(shown, spelling, writing or asked.answer, asked.answer.length_limit)


def _longest(shown: Iterable[Shown], data: Read, spelling: Spelling, writing: Writing, text: int, image: bool) -> Rows:
    made = list(_usable(shown, spelling, writing, text))
    if made:
        return Rows(max(made, key=lambda row: row.length), data=data)
    grid = spelling.layout.grid.length
    length = ASSUMED + text + grid * (data.sources + image)
    return Rows(Row(length, ASSUMED, text, image), assumed=_assumed(data.assumed), data=data)


def _assumed(why: str) -> str:
    return f"prompts are taken to be {ASSUMED} positions: {why or 'the policy can take none of the first ones'}"


def _usable(shown: Iterable[Shown], spelling: Spelling, writing: Writing, text: int) -> Iterator[Row]:
    for one in shown:
        try:
            yield _row(one, spelling, writing, text)
        except UnusablePrompt:  # which a run leaves out, and counts
            continue


def _row(shown: Shown, spelling: Spelling, writing: Writing, text: int) -> Row:
    """`text`: what the policy writes, where nothing is taught. Raises UnusablePrompt."""
    if shown.text:
        plain = writing_spelling(spelling, Writing(template="{prompt}"), 0, True)
        text = len(plain.encode(shown.text)) + 1  # what ends it
    if text:
        spelling = writing_spelling(spelling, writing, text, shown.image)
    if (fault := spelling.fault(shown.prompt, shown.sources)) is not None:
        raise fault
    ids = spelling.about(shown.sources).encode(shown.prompt)
    return Row(spelling.length(ids, shown.sources), len(ids), text, shown.image)
