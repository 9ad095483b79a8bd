"""What a generated scene can be asked to show: every combination of the configured shapes, and its prompt."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

from rewards.scenes_spec import RELATIONS, Edit, ObjectGroup
from rlmm.config.data import ScenesData
from rlmm.seeds import derive

COUNTS = ("no", "a", "two", "three", "four")
SIDES = {"left_of": "left of", "right_of": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class Combination:
    """One or two groups of objects, and what is said of them.

    `relation` is of the first group to the second. With `edit`, the groups are those of the source image.
    """

    task: str
    groups: tuple[ObjectGroup, ...]
    relation: str | None = None
    edit: Edit | None = None

    @property
    def prompt(self) -> str:
        """The request in English, e.g. `two red circles above a blue square`, `make the red circles blue`."""
        if self.edit is not None:
            return _instruction(self.edit, next((g.count for g in self.groups if _edits(self.edit, g)), 1))
        return self._listed(self.groups)

    @property
    def descriptions(self) -> tuple[str, ...]:
        """What the scene may be called: the prompt, and it with the groups in the other order."""
        return tuple(dict.fromkeys((self.prompt, self._listed(self.groups[::-1]))))

    def _listed(self, groups: Sequence[ObjectGroup]) -> str:
        link = f" {SIDES[self.relation]} " if self.relation else " and "
        return link.join(f"{COUNTS[group.count]} {_noun(group)}" for group in groups)


def _noun(group: ObjectGroup) -> str:
    return f"{group.color} {group.shape}" + ("s" if group.count > 1 else "")


def _edits(edit: Edit, group: ObjectGroup) -> bool:
    return (edit.shape, edit.color) == (group.shape, group.color)


def _instruction(edit: Edit, count: int) -> str:
    noun = _noun(ObjectGroup(edit.shape, edit.color, count))
    match edit.kind:
        case "recolor":
            return f"make the {noun} {edit.to}"
        case "reshape":
            return f"turn the {noun} into {f'{edit.to}s' if count > 1 else f'a {edit.to}'}"
        case "remove":
            return f"remove the {noun}"
        case _:
            return f"add a {edit.color} {edit.shape}"


def all_groups(config: ScenesData) -> list[ObjectGroup]:
    """Every (shape, colour, count)."""
    return [
        ObjectGroup(shape, color, count)
        for shape in config.shapes
        for color in config.colors
        for count in range(1, config.max_count + 1)
    ]


def held_out_sets(sets: Iterable[frozenset[ObjectGroup]], share: float) -> set[frozenset[ObjectGroup]]:
    """The `share` (at least one) of the sets with the lowest hash: which ones is fixed by the sets alone."""
    ordered = sorted(sets, key=lambda groups: derive("scenes", "held out", *sorted(map(repr, groups))))
    return set(ordered[: max(1, round(share * len(ordered)))])


def by_task(config: ScenesData, *, held_out: bool) -> dict[str, list[Combination]]:
    """The combinations of one side by task (for edits: by kind of edit), in a fixed order.

    A side is a set of object groups: things held out together are never together in training, in any
    relation.
    """
    groups = all_groups(config)
    singles = [(group,) for group in groups]
    pairs = [
        pair for pair in combinations(groups, 2) if (pair[0].shape, pair[0].color) != (pair[1].shape, pair[1].color)
    ]
    sides = [(wanted, held_out_sets(map(frozenset, wanted), config.held_out_share)) for wanted in (singles, pairs)]
    ones, twos = ([one for one in wanted if (frozenset(one) in out) == held_out] for wanted, out in sides)
    # Several relations hold in one scene, so no answer that names one would be the right one.
    tasks_asked = [task for task in config.tasks if config.variant != "describe" or task != "relation"]
    made = _edited([*ones, *twos], config) if config.variant == "edit" else _described(ones, twos, tasks_asked)
    tasks: dict[str, list[Combination]] = {}
    for combination in made:
        tasks.setdefault(combination.task, []).append(combination)
    return tasks


def _described(
    ones: Sequence[tuple[ObjectGroup, ...]], twos: Sequence[tuple[ObjectGroup, ...]], tasks: Sequence[str]
) -> Iterator[Combination]:
    if "count" in tasks:
        yield from (Combination("count", one) for one in ones)
    orders = [order for pair in twos for order in permutations(pair)]
    if "pair" in tasks:
        yield from (Combination("pair", order) for order in orders)
    if "relation" in tasks:
        yield from (Combination("relation", order, relation) for order in orders for relation in RELATIONS)


def _edited(sources: Sequence[tuple[ObjectGroup, ...]], config: ScenesData) -> Iterator[Combination]:
    """Every edit that changes its source and leaves a scene: built so, hence nothing has to be drawn
    again."""
    for groups in sources:
        counts = {(group.shape, group.color): group.count for group in groups}
        for shape, color in counts:
            for to in config.colors:
                if (shape, to) not in counts:
                    yield Combination("recolor", groups, edit=Edit("recolor", shape, color, to))
            for to in config.shapes:
                if (to, color) not in counts:
                    yield Combination("reshape", groups, edit=Edit("reshape", shape, color, to))
            if len(groups) > 1:
                yield Combination("remove", groups, edit=Edit("remove", shape, color))
        for shape in config.shapes:
            for color in config.colors:
                if counts.get((shape, color), 0) < config.max_count:
                    yield Combination("add", groups, edit=Edit("add", shape, color))
