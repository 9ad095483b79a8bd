"""Where this installation lies: its sibling packages and its recipes. Standard library only."""

from importlib.util import find_spec
from pathlib import Path

ROOMS = ("rewards", "rollouts")
_PACKAGE = Path(__file__).resolve().parent


def recipes_dir() -> Path:
    """Folder of the shipped recipes: `rlmm/configs` in an installed wheel, `configs` in a checkout."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def require_own_rooms() -> None:
    """Raise ImportError unless `rewards` and `rollouts` would be imported from beside this `rlmm`.

    Both are common names: a folder or a file called so in the working directory, or in another distribution,
    would otherwise be used in their place, and fail later or score with somebody else's code.
    """
    for name in ROOMS:
        own, found = _PACKAGE.parent / name, room_path(name)
        if found is None:
            raise ImportError(
                f"rlmm at {_PACKAGE} came without its package {name!r} (expected {own}). Install rlmm again."
            )
        if found not in (own, own / "__init__.py"):
            raise ImportError(
                f"rlmm at {_PACKAGE} needs its own package {name!r} ({own}), but Python finds {found} first. "
                f"Rename or move that, or take its folder off sys.path (PYTHONPATH, working directory)."
            )


def room_path(name: str) -> Path | None:
    """What `import name` would load: a file, or a folder without `__init__.py`; None if nothing."""
    spec = find_spec(name)
    if spec is None:
        return None
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    return Path(places[0]).resolve() if places else None
