"""Programs of the tests that change the process they live in, and so are given one of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def answer_of(program: str, *arguments: str, timeout: float) -> dict[str, Any]:
    """The JSON object that a program beside this file prints in its last line."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / program), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])
