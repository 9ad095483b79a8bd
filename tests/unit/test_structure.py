"""The shape of the tree: who may import whom, sizes, marks, and the lock against the declared ranges."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [path for room in ("rlmm", "rewards", "rollouts", "examples") for path in sorted((ROOT / room).rglob("*.py"))]
BUILT_IN_MARKS = {"filterwarnings", "parametrize", "skip", "skipif", "usefixtures", "xfail"}


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> list[Requirement]:
    """The base requirements and those of the extras, without references to rlmm's own extras."""
    project = PYPROJECT["project"]
    lines = sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])
    return [need for need in map(Requirement, lines) if need.name != "rlmm"]


def imported(tree: ast.Module) -> set[str]:
    """Top-level names of every absolute import, wherever in the file it stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function, its docstring not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            yield node.name, lines


def marks(tree: ast.Module) -> set[str]:
    """X of every `pytest.mark.X`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark":
            found.add(node.attr)
    return found


def test_the_readers_see_what_they_should() -> None:
    tree = ast.parse(
        "import os.path\nfrom . import a\n@pytest.mark.slow\ndef f():\n"
        "    '''Two\n    lines.'''\n    from rlmm.x import y\n    return y\n"
    )
    assert imported(tree) == {"os", "rlmm"}
    assert list(functions(tree)) == [("f", 3)]
    assert marks(tree) == {"slow"}


@pytest.mark.parametrize(("room", "forbidden"), [("rewards", {"rlmm", "rollouts"}), ("rollouts", {"rlmm", "rewards"})])
def test_imports_go_one_way(room: str, forbidden: set[str]) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): imported(ast.parse(file.read_text())) & forbidden for file in files}
    assert not {file: names for file, names in wrong.items() if names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300, "split the file: one thing a file"
    long = {name: lines for name, lines in functions(ast.parse(text)) if lines > 60}
    assert not long, "split the function: one thing a function"


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda one: one.name)
def test_lines_of_docs_are_short(path: Path) -> None:
    """Of prose: tables and code are as wide as they must be."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_every_package_has_an_init() -> None:
    folders = {path.parent for path in SOURCES if "examples" not in path.relative_to(ROOT).parts}
    assert not sorted(str(folder) for folder in folders if not (folder / "__init__.py").is_file())


def test_every_mark_is_registered() -> None:
    registered = {line.split(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    used = {path.name: marks(ast.parse(path.read_text())) for path in (ROOT / "tests").rglob("*.py")}
    unknown = {name: found - registered - BUILT_IN_MARKS for name, found in used.items()}
    assert not {name: found for name, found in unknown.items() if found}


def test_every_import_is_a_declared_dependency() -> None:
    names = {name for path in SOURCES for name in imported(ast.parse(path.read_text()))}
    foreign = names - sys.stdlib_module_names - {"rlmm", "rewards", "rollouts"}
    known = {normal(need.name) for need in declared(*PYPROJECT["project"]["optional-dependencies"])}
    owners = packages_distributions()
    assert not {name for name in foreign if known.isdisjoint(map(normal, owners.get(name, [name])))}


@pytest.mark.parametrize("lock", ["py311-cpu.txt", "py312-cpu.txt"])
def test_the_lock_fits_the_declared_ranges(lock: str) -> None:
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    versions = {normal(name): version for name, version in pins.items()}
    for need in declared("cpu", "deepspeed", "ocr", "dev"):
        version = versions[normal(need.name)]
        assert need.specifier.contains(version, prereleases=True), f"{need} is locked at {version}"
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(versions), "they do not import beside this torch"


@pytest.mark.parametrize("stray", ["rewards/__init__.py", "rollouts.py"])
def test_a_stray_package_of_the_same_name_is_an_error_that_names_it(stray: str, tmp_path: Path) -> None:
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).write_text("")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import rlmm"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert str(tmp_path.resolve() / stray) in done.stderr


def test_importing_the_program_loads_nothing_heavy(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rlmm, rlmm.doctor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert not {"torch", "transformers", "deepspeed", "vllm", "numpy"} & set(done.stdout.split())
