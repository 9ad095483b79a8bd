"""Runs of several processes as people start them: by --nproc, by accelerate, by plain ssh, under Slurm."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args

from rlmm import launcher
from rlmm.cli import run
from rlmm.config.recipe import read_recipe
from rlmm.launcher import check_launcher, launch
from rlmm.run_folder import RunFolder
from rlmm.train.signals import EXIT_STOPPED

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "recipes" / "tiny.yaml"
CODEC = json.dumps({"kind": "codec", "steps": 2, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 2})
SFT = {
    "kind": "sft", "steps": 2, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 3e-3, "checkpoint_every": 2,
}  # fmt: skip
GRPO = {
    "kind": "grpo", "steps": 2, "prompts_per_step": 2, "samples_per_prompt": 4, "micro_batch_size": 2,
    "learning_rate": 1e-3, "checkpoint_every": 2, "lora": {"rank": 4, "alpha": 4},
    "objective": {"name": "grpo", "kl": {"kind": "k3", "coefficient": 0.01}},
}  # fmt: skip
# What ssh and srun are to the examples: they run a command on a node, which here is this machine.
SSH = '#!/bin/bash\nexec bash -c "$2"\n'
# One that goes on until it is told to stop, or fails.
TORCHRUN = """#!/bin/bash
for given; do case $given in --node-rank=*) rank=${given#*=} ;; esac; done
trap 'echo told > "${0%/*}/told-$rank"; exit 1' TERM
echo "$@" > "${0%/*}/new-$rank" && mv "${0%/*}/new-$rank" "${0%/*}/begun-$rank"
[ "${FAILING:-}" = "$rank" ] && until [ -e "${0%/*}/begun-0" ]; do sleep 0.1; done && exit 3
for _ in {1..300}; do sleep 0.1; done
"""
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
for node in 0 1; do SLURM_NODEID=$node "$@" & done
wait -n && wait -n
"""
# Slow, so that a reader which stops at the first name has gone when the second is written.
SCONTROL = "#!/bin/bash\necho 127.0.0.1\nsleep 0.3\necho 127.0.0.2\n"


def started(command: list[str], folder: Path, stages: str, **environment: str) -> "subprocess.Popen[str]":
    """The command with the tiny recipe of these stages, in `run` of the folder."""
    overrides = [str(RECIPE), f"run_dir={folder / 'run'}", f"stages={stages}", "runtime.trackers=[]"]
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {**os.environ, **environment, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *overrides], cwd=ROOT, env=given, **pipes)


def ran(command: list[str], folder: Path, stages: str = f"{{codec: {CODEC}}}", **environment: str) -> Path:
    """The folder of a run, of one codec stage by default, that the command started."""
    process = started(command, folder, stages, **environment)
    out, error = process.communicate(timeout=500)
    assert process.returncode == 0, out[-2000:] + error[-4000:]
    assert "FutureWarning" not in error, error[:4000]  # one a call of a library would bury what a run says
    return folder / "run"


def processes_of(run: Path) -> int:
    (stage,) = (run / "stages").glob("*codec*/stage.json")
    return json.loads(stage.read_text())["processes"]


def script(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.mark.long
def test_nproc_starts_processes_of_this_machine(tmp_path: Path) -> None:
    assert processes_of(ran([sys.executable, "-m", "rlmm.cli", "run", "--nproc", "2"], tmp_path)) == 2


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--nproc", "2"]], ids=["alone", "two"])
def test_a_run_that_is_told_to_end_finishes_its_step_and_says_again(tmp_path: Path, more: list[str]) -> None:
    steps, metrics = 60, tmp_path / "run" / "stages" / "03-grpo" / "metrics.jsonl"
    stages = {"codec": json.loads(CODEC), "sft": SFT, "grpo": GRPO | {"steps": steps, "checkpoint_every": steps}}
    command = [sys.executable, "-m", "rlmm.cli", "run", *more]
    process = started(command, tmp_path, json.dumps(stages))
    while not metrics.is_file() or not metrics.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=500)
    assert process.returncode == EXIT_STOPPED, out[-2000:] + error[-4000:]
    made = len(metrics.read_text().splitlines())
    assert made < steps and "Go on with the same command" in out
    process = started(command, tmp_path, json.dumps(stages))
    out, error = process.communicate(timeout=500)
    assert process.returncode == 0 and f"resuming from step {made} of {steps}" in out, out[-2000:] + error[-4000:]
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, steps + 1))


def test_nproc_under_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2.*leave --nproc out"):
        launch(2, RECIPE, [])


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (ChildFailedError("rlmm", {1: ProcessFailure(1, 9, 75, "")}), "running", 75),
        (ChildFailedError("rlmm", {1: ProcessFailure(1, 9, -9, "")}), "running", 137),
        (SignalException("told", signal.SIGTERM), "stopped", 75),
        (SignalException("told", signal.SIGTERM), "running", 143),
        (SignalException("told", signal.SIGTERM), "done", 143),  # of the last stage but one
        (SignalException("told", signal.SIGTERM), "all done", 0),
    ],
)
def test_nproc_ends_as_its_processes_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: Exception, status: str, code: int
) -> None:
    def fail(arguments: list[str]) -> None:
        settings = parse_args(arguments)
        assert settings.rdzv_backend == "static" and settings.master_port  # the other ways pickle
        raise raised

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch.distributed.run.main", fail)
    names = tuple(read_recipe(RECIPE).stages)
    marked, run = status.removeprefix("all "), RunFolder(tmp_path, names)
    for name in names if status == "all done" else names[:-1]:
        run.mark(name, "codec", marked)
    with pytest.raises(SystemExit) as ended:
        launch(2, RECIPE, [f"run_dir={tmp_path}"])
    assert ended.value.code == code


def test_a_port_that_was_taken_meanwhile_is_chosen_once_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the real torchrun, whose processes end at once: there is no such recipe."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        chosen = [other.getsockname()[1], launcher.free_port()]
        monkeypatch.setattr(launcher, "free_port", lambda: chosen.pop(0))
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        with pytest.raises(SystemExit) as ended:
            launch(1, tmp_path / "none.yaml", [])
    assert ended.value.code == 2 and not chosen


@pytest.mark.long
def test_two_nodes_by_ssh(tmp_path: Path) -> None:
    script(tmp_path, "ssh", SSH)
    hosts = {"HOSTS": "127.0.0.1 127.0.0.1", "NPROC": "1", "MASTER_PORT": "29517"}
    assert processes_of(ran([str(ROOT / "examples" / "nodes.sh")], tmp_path, **hosts)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nodes_by_ssh_are_asked_to_stop_when_the_script_ends(tmp_path: Path, number: signal.Signals) -> None:
    script(tmp_path, "ssh", SSH)
    script(tmp_path, "torchrun", TORCHRUN)
    process = started([str(ROOT / "examples" / "nodes.sh")], tmp_path, "{}", HOSTS="a b", NPROC="2")

    def found(name: str) -> list[str]:
        until = time.monotonic() + 20
        while len(files := sorted(tmp_path.glob(f"{name}-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        return [file.read_text() for file in files]

    for rank, given in enumerate(found("begun")):
        assert f"--node-rank={rank} " in given and "--nnodes=2 --nproc-per-node=2" in given
        assert "SIGUSR1 --shutdown-timeout=600" in given and f"rlmm.cli run {RECIPE}" in given
    assert not list(tmp_path.glob("told-*"))
    process.send_signal(number)
    assert found("told") == ["told\n", "told\n"]
    assert process.wait(20) == (-number if number == signal.SIGKILL else 128 + number)


def test_a_node_by_ssh_that_fails_ends_the_others(tmp_path: Path) -> None:
    script(tmp_path, "ssh", SSH)
    script(tmp_path, "torchrun", TORCHRUN)
    process = started([str(ROOT / "examples" / "nodes.sh")], tmp_path, "{}", HOSTS="a b", FAILING="1")
    assert process.wait(20) == 3 and [file.name for file in tmp_path.glob("told-*")] == ["told-0"]


@pytest.mark.long
def test_two_nodes_under_slurm(tmp_path: Path) -> None:
    script(tmp_path, "srun", SRUN)
    script(tmp_path, "scontrol", SCONTROL)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "MASTER_PORT": "29518"}
    assert processes_of(ran(["bash", str(ROOT / "examples" / "slurm.sbatch")], tmp_path, **slurm)) == 2


def figures_of(run: Path, stage: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.mark.long
@pytest.mark.parametrize("zero", [False, True], ids=["plain", "zero3"])
def test_accelerate_launch_starts_what_nproc_does(tmp_path: Path, zero: bool) -> None:
    parts = {"deepspeed": "configs/deepspeed/zero3.json"} if zero else {}
    stages = {"codec": json.loads(CODEC) | parts, "sft": SFT | parts, "grpo": GRPO | parts}
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "rlmm.cli", "run"]
    commands = {"accelerate": accelerate, "nproc": [sys.executable, "-m", "rlmm.cli", "run", "--nproc", "2"]}
    runs = []
    for name, command in commands.items():
        (tmp_path / name).mkdir()
        runs.append(ran(command, tmp_path / name, json.dumps(stages)))
    assert [processes_of(run) for run in runs] == [2, 2]
    for stage in ("02-sft", "03-grpo"):
        one, two = ((run / "stages" / stage / "model" / "model.safetensors").read_bytes() for run in runs)
        assert figures_of(runs[0], stage) == figures_of(runs[1], stage)
        assert one == two


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "2"}, "ACCELERATE_MIXED_PRECISION=bf16.*precision"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}, "in each stage's `deepspeed`"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "no stage is compiled"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "asked for several.*--multi_gpu"),
    ],
)
def test_what_accelerate_launch_may_not_say(environment: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_launcher(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500", "WORLD_SIZE": "2"},
        {"MASTER_PORT": "29500"},
    ],
    ids=["accelerate, one process", "accelerate, two", "no accelerate"],
)
def test_what_accelerate_launch_may_say(environment: dict[str, str]) -> None:
    check_launcher(environment)


def test_a_run_looks_at_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="accelerate launch has set"):
        run(RECIPE)
