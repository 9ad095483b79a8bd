"""Rewards that other installed packages bring, found by their entry points."""

from collections import Counter
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points

GROUP = "rlmm.rewards"
"""In a package's pyproject: ``[project.entry-points."rlmm.rewards"]``, then ``name = "module:function_or_class"``."""


def plugins(built_in: Collection[str]) -> dict[str, EntryPoint]:
    """The rewards of other packages by name; nothing of them is imported. Raises ValueError for a name that two of them
    use, or that is a built-in reward's.
    """
    found = list(entry_points(group=GROUP))
    counts = Counter(point.name for point in found)
    for point in found:
        if counts[point.name] > 1 or point.name in built_in:
            others = [other.value for other in found if other.name == point.name]
            raise ValueError(
                f"the reward name {point.name!r} is taken more than once: by {' and '.join(others)}"
                f"{' and a built-in reward' if point.name in built_in else ''}. Uninstall one, or name it by function"
            )
    return {point.name: point for point in found}


def target_of(point: EntryPoint) -> str:
    """What an entry point stands for, as `function` takes it."""
    return f"{point.module}:{point.attr}"
