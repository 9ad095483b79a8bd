"""The figures of a stage as a file that grows, is read at every step, and is cut back on resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlmm.train.metrics import MetricsFile


def steps(file: MetricsFile) -> list[int]:
    return [row["step"] for row in file.read()]


def test_the_last_lines_alone_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    loads = json.loads

    def counted(line: Any) -> Any:
        parsed.append(line)
        return loads(line)

    monkeypatch.setattr(json, "loads", counted)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.last(3) == []
    for step in range(1, 41):
        file.append(step, {"loss": float(step)})
    assert [row["step"] for row in file.last(3)] == [38, 39, 40] and len(parsed) <= 4
    assert [row["step"] for row in file.last(100)] == steps(file) == list(range(1, 41))
    file.cut(2)
    assert [row["step"] for row in file.last(3)] == [1, 2]


def test_a_torn_line_is_left_out_until_it_is_whole(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"loss": 1.0})
    with file.path.open("a") as handle:
        handle.write('{"step": 2, "lo')
    assert steps(file) == [1] == [row["step"] for row in file.last(1)]
    with file.path.open("a") as handle:
        handle.write('ss": 2.0}\n')
    assert steps(file) == [1, 2]
