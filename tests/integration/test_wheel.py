"""The wheel alone, outside the checkout: all three packages, every module of them, and the recipes."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import rewards, rlmm, rollouts
from importlib.metadata import entry_points, version
from rlmm.installation import recipes_dir
plugins = [entry.value for entry in entry_points(group="vllm.general_plugins") if entry.name == "rlmm"]
print(json.dumps({"files": [m.__file__ for m in (rlmm, rewards, rollouts)], "recipes": str(recipes_dir()),
                  "plugins": plugins, "versions": [version("rlmm"), rlmm.__version__]}))
"""


def pip(*arguments: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("rlmm-*.whl")
    return built


def test_the_wheel_holds_every_module_and_recipe_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = [path for room in ("rlmm", "rewards", "rollouts") for path in (ROOT / room).rglob("*")]
    modules = {str(path.relative_to(ROOT)) for path in sources if path.is_file() and path.suffix != ".pyc"}
    recipes = {f"rlmm/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert names == modules | recipes


def test_the_installed_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", REPORT, str(target)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["files"] == [str(target / room / "__init__.py") for room in ("rlmm", "rewards", "rollouts")]
    assert found["recipes"] == str(target / "rlmm" / "configs")
    assert "rollouts.vllm_engine.plugin:register" in found["plugins"]
    assert found["versions"][0] == found["versions"][1]
    assert (target / "bin" / "rlmm").is_file()
