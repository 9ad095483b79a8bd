"""A user's own Python function as a reward: found by name, called in our signature or in TRL's."""

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.base import Reward, Sample, Score
from rewards.gold import GoldPair
from rewards.names import nearest
from rewards.runner import RewardContractError

GIVEN = ("samples", "prompts", "completions")
"""Arguments of a reward function that are no options."""


class RewardLoadError(ValueError):
    """A reward function that cannot be found or called; the text says what was given and what to do."""


def load_function(target: str, what: str = "reward function") -> Callable[..., Any]:
    """The function named by ``path/file.py:name`` (relative to the working directory) or
    ``package.module:name``; ``what`` is what errors call it.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise RewardLoadError(f"{what} {target!r} must be written path/file.py:name or module:name")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    function = getattr(module, name, None)
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardLoadError(f"{place} has no function {name!r}. {nearest(name, functions)}")
    if not callable(function):
        raise RewardLoadError(f"{target} is a {type(function).__name__}, not a function that can be called")
    return function


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        beside = [item.name for item in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = f" {nearest(path.name, beside)}" if beside else ""
        raise RewardLoadError(f"there is no file {path} (looked in {Path.cwd()}).{hint}")
    # A name of its own, so that two files of one name do not hide each other.
    name = f"_reward_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardLoadError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # the module is there, and something that it imports is not
        raise RewardLoadError(f"there is no module {name!r}; for a file, write path/file.py:name") from error


class _Loop:
    """One event loop in a daemon thread, so that a function's HTTP client keeps its loop from call to
    call.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="reward loop", daemon=True).start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


@dataclass(frozen=True)
class _Signature:
    """How a function wants to be called."""

    trl: bool
    names: frozenset[str]
    required: frozenset[str]
    takes_any: bool

    @staticmethod
    def of(function: Callable[..., Any], target: str, options: Mapping[str, Any]) -> "_Signature":
        """Reads a function's signature; RewardLoadError for one that is neither ours nor TRL's."""
        signature = inspect.signature(function)
        kinds = inspect.Parameter
        named = {
            key: item
            for key, item in signature.parameters.items()
            if item.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
        }
        takes_any = any(item.kind is kinds.VAR_KEYWORD for item in signature.parameters.values())
        if not takes_any and (unknown := [option for option in options if option not in named]):
            known = [key for key in named if key not in GIVEN]
            hint = nearest(unknown[0], known) if known else "It takes none."
            raise RewardLoadError(f"{target} takes no option {unknown[0]!r}. {hint}")
        required = {key for key, item in named.items() if item.default is item.empty} - set(options)
        trl = "completions" in named
        if not trl and len(required) != 1:
            raise RewardLoadError(
                f"{target} has the signature {signature}; a reward function is (samples) -> list of scores, "
                "or (prompts, completions, **columns) -> list of floats"
            )
        return _Signature(trl, frozenset(named) - set(options), frozenset(required), takes_any)


class FunctionReward:
    """A user's function as a reward. It may be async, and has one of two signatures:

    - ``(samples) -> list[Score | float | None]``, where `samples` may have any name
    - ``(prompts, completions, **columns) -> list[float | None]``, which is TRL's and is known by
      `completions`: each sample's image (a list where a sample has several, its text where it has none).
      Every further parameter is a column of the data rows, a list with one value a sample; `source_images`,
      `target_images` and `target_texts` are lists of lists, `texts` is what the policy wrote. A function with
      ``**kwargs`` gets every column.

    None means 'not applicable' and makes the sample unavailable. `options` are passed on as keywords.
    """

    def __init__(self, target: str, *, name: str = "", options: Mapping[str, Any] | None = None) -> None:
        self.function = load_function(target)
        self.target = target
        self.name = name or target.rpartition(":")[2]
        self.options = dict(options or {})
        self._signature = _Signature.of(self.function, target, self.options)
        self._loop: _Loop | None = None

    def fingerprint(self) -> str:
        """The function's name, options and the hash of its file: a cached score dies with an edit of the
        file.
        """
        source = inspect.getsourcefile(inspect.unwrap(self.function))
        content = Path(source).read_bytes() if source else b""
        return f"function {self.target} {self.options!r} {hashlib.sha256(content).hexdigest()[:16]}"

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """What the function answers, unchecked: the runner reads floats and None, and checks the length."""
        if self._signature.trl:
            answer = self.function(**self._columns(samples), **self.options)
        else:
            answer = self.function(samples, **self.options)
        if inspect.iscoroutine(answer):
            self._loop = self._loop or _Loop()
            return self._loop.run(answer)
        return answer

    def gold(self) -> Sequence[GoldPair]:
        """The pairs that the function brings (`gold.with_gold`), none where it brings none."""
        pairs = getattr(self.function, "gold", None)
        return pairs() if callable(pairs) else []

    def _columns(self, samples: Sequence[Sample]) -> dict[str, list[Any]]:
        """The keyword arguments of a call in TRL's signature."""
        given = _row_columns(samples) | {
            "prompts": [sample.prompt for sample in samples],
            "completions": [_completion(sample) for sample in samples],
            "source_images": [list(sample.source_images) for sample in samples],
            "target_images": [list(sample.target_images) for sample in samples],
            "texts": [sample.text for sample in samples],
            "target_texts": [list(sample.target_texts) for sample in samples],
        }
        if missing := sorted(self._signature.required - set(given)):
            raise RewardContractError(
                f"reward function {self.target} wants {', '.join(map(repr, missing))}, which is no column "
                f"of the data. {nearest(missing[0], given)}"
            )
        wanted = set(given) - set(self.options) if self._signature.takes_any else self._signature.names
        return {key: values for key, values in given.items() if key in wanted}


def _completion(sample: Sample) -> Any:
    if not sample.images:
        return sample.text
    return sample.images[0] if len(sample.images) == 1 else list(sample.images)


def _row_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Every column that any of the samples' rows has, None where a row lacks it."""
    names = dict.fromkeys(name for sample in samples for name in sample.row)
    return {name: [sample.row.get(name) for sample in samples] for name in names}


def load_reward(target: str, name: str, options: Mapping[str, Any]) -> Reward:
    """A user's reward: a function (`FunctionReward`), or a class that is a Reward when it is made with `options`.
    RewardLoadError for what is neither.
    """
    found = load_function(target)
    if not inspect.isclass(found):
        return FunctionReward(target, name=name, options=options)
    known = inspect.signature(found).parameters.values()
    takes_any = any(item.kind is item.VAR_KEYWORD for item in known)
    if not takes_any and (unknown := [key for key in options if key not in {item.name for item in known}]):
        raise RewardLoadError(
            f"{target} takes no option {unknown[0]!r}. {nearest(unknown[0], [i.name for i in known])}"
        )
    made = found(**options)
    if not isinstance(made, Reward):
        lacking = [part for part in ("name", "score", "fingerprint") if not hasattr(made, part)]
        raise RewardLoadError(f"the class {target} is no reward: it has no {' and no '.join(lacking)}")
    return made
