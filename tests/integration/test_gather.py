"""What processes tell each other arrives as it went, and what cannot is said."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlmm.train.processes import gather, gather_arrays
from tests.integration.programs import ROOT


def test_two_processes_tell_each_other_what_there_is(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.gather_program", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ((1, 2), "the value is a builtins.tuple"),
        ([0, {"a": np.float32(1)}], r"the value\[1\]\['a'\] is a numpy.float32"),
        ({1: "a"}, "a key of type int"),
        (b"bytes", "is a builtins.bytes"),
    ],
)
def test_what_json_would_change_is_refused_by_one_process_too(value: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        gather(value)


def test_arrays_of_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="[Oo]bject arrays cannot be saved"):
        gather_arrays(np.array([None, {}]))
