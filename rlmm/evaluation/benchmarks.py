"""Prompt files of published benchmarks, as their authors ship them, read whole or not at all."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.object_spec import read_spec
from rlmm.config.base import nearest


class BenchmarkError(ValueError):
    """A prompt file that is not what its benchmark ships; the text names file, line and fault."""


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt. `key` is unique in its file and names its pictures; `group` is what scores are listed by; `row` has
    what the file says of it.
    """

    key: str
    prompt: str
    group: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


def read_benchmark(kind: str, path: Path) -> list[BenchPrompt]:
    """The prompts of a file in its order.

    Raises BenchmarkError for an unknown benchmark, a file that is not there, and the first line that is no prompt of
    it: no line is passed over.
    """
    if kind not in READERS:
        raise BenchmarkError(f"there is no benchmark {kind!r}.{nearest(kind, list(READERS))}")
    if not path.is_file():
        raise BenchmarkError(f"there is no file {path}; give the prompt file of {kind}, {FILES[kind]}")
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is no text in UTF-8: {error}") from error
    read: list[BenchPrompt] = []
    for number, line in enumerate(lines, 1):
        try:
            read.append(READERS[kind](line, len(read)))
        except (ValueError, KeyError, TypeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise BenchmarkError(f"{path}, line {number}: {what}; is it {FILES[kind]}?") from error
    _check(path, read)
    return read


def _check(path: Path, read: Sequence[BenchPrompt]) -> None:
    if not read:
        raise BenchmarkError(f"{path} has no prompts")
    if empty := [item.key for item in read if not item.prompt.strip()]:
        raise BenchmarkError(f"{path}: the prompt {empty[0]!r} is empty")
    key, count = Counter(item.key for item in read).most_common(1)[0]
    if count > 1:
        raise BenchmarkError(f"{path}: {count} prompts are called {key!r}, and their pictures would be one")


def _geneval(line: str, place: int) -> BenchPrompt:
    row = json.loads(line)
    read_spec(row)  # raises ValueError for metadata that no picture could be judged by
    return BenchPrompt(f"{place:05d}", _text(row, "prompt"), _text(row, "tag"), row)


def _compbench(line: str, place: int) -> BenchPrompt:
    # The authors' own reader takes what stands before a tab.
    prompt = line.split("\t")[0].strip()
    if bad := sorted(set(prompt) & {"_", "/"}):
        raise ValueError(f"the prompt has a {bad[0]!r}, by which the official scripts part a picture's name")
    return BenchPrompt(f"{place:06d}", prompt)


def _dpg(line: str, place: int) -> BenchPrompt:
    row = json.loads(line)
    key = _text(row, "item_id")
    if set(key) & {".", "/"}:
        raise ValueError(f"the item_id {key!r} cannot be the name of a picture")
    return BenchPrompt(key, _text(row, "prompt"), row=row)


def _longtext(line: str, place: int) -> BenchPrompt:
    row = json.loads(line)
    number, texts = row["prompt_id"], row["text"]
    if type(number) is not int or number < 0:
        raise ValueError(f"prompt_id {number!r} is no number")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("`text` is no list of the texts to be written")
    return BenchPrompt(f"{number:04d}", _text(row, "prompt"), _text(row, "category"), row)


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"`{name}` is of type {type(row[name]).__name__}, no text")
    return row[name]


READERS: Mapping[str, Callable[[str, int], BenchPrompt]] = {
    "geneval": _geneval,
    "t2i_compbench": _compbench,
    "dpg_bench": _dpg,
    "longtext_bench": _longtext,
}
"""How a line of a benchmark's file is read, with the number of prompts before it."""

FILES: Mapping[str, str] = {
    "geneval": "evaluation_metadata.jsonl of djghosh13/geneval: a row {tag, include, prompt} a line",
    "t2i_compbench": "a file of examples/dataset of Karine-Huang/T2I-CompBench: a prompt a line",
    "dpg_bench": "{item_id, prompt} a line, one for each of dpg_bench/prompts/*.txt of TencentQQGYLab/ELLA",
    "longtext_bench": "text_prompts.jsonl of X-Omni-Team/X-Omni: a row {prompt_id, prompt, text, category} a line",
}
"""What each of them is."""


def summary(prompts: Sequence[BenchPrompt]) -> str:
    """How many there are, and of which group."""
    groups = Counter(item.group for item in prompts if item.group)
    listed = ", ".join(f"{count} {name}" for name, count in groups.items())
    return f"{len(prompts)} prompts" + (f" ({listed})" if listed else "")
