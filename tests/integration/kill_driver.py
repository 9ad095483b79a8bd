"""Runs a tiny recipe whole, and again with a kill at each of some places (or another bad event) and then a resume.

A program of its own (`OUT RECIPE PROCESSES PLACE ...`): it imports once and forks a child for every process of a run,
and it is the last one of a run that meets the event, e.g. kills itself with SIGKILL at its place. Prints one JSON
object: place -> statuses of the processes and digest of weights and metrics.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rlmm.evaluation.evaluate as evaluate_module
import rlmm.export as export_module
import rlmm.train.dpo_reference as reference_module
import rlmm.train.grpo as grpo_module
import rlmm.train.pair_samples as samples_module
import rlmm.train.pairs as pairs_module
import rlmm.train.trainer as trainer_module
from rewards.compose import CompositeReward
from rlmm.run_folder import RunFolder
from rlmm.train.trainer import StageTrainer
from rollouts.torch_engine.causal import TorchEngine
from rollouts.torch_engine.masked import MaskedTorchEngine
from tests.integration.forked import run_forked

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
STAGES = ("codec", "sft", "grpo")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(original: Callable[..., Any], call: int) -> Callable[..., Any]:
    """`original` until its call number `call` (from 1), which dies after doing its work."""
    return after(original, call, die)


def asking(original: Callable[..., Any], call: int, number: signal.Signals) -> Callable[..., Any]:
    """`original`, and after its call number `call` a signal to this process."""
    return after(original, call, lambda: os.kill(os.getpid(), number))


def slowed(original: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return original(*args, **kwargs)

    return wrapped


def after(original: Callable[..., Any], call: int, event: Callable[[], None]) -> Callable[..., Any]:
    """`original`, and after its call number `call` (from 1) an event."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        if calls == call:
            event()
        return result

    return wrapped


def before(original: Callable[..., Any], call: int, event: Callable[[], None]) -> Callable[..., Any]:
    """`original`, and an event in place of its call number `call` (from 1)."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return event() if calls == call else original(*args, **kwargs)

    return wrapped


def kill_in_codec() -> None:
    StageTrainer.compute_loss = dying(StageTrainer.compute_loss, 3)  # of 4, after a checkpoint


def kill_in_sft() -> None:
    StageTrainer.compute_loss = dying(StageTrainer.compute_loss, 4 + 6)  # codec 4, then SFT's third step of 4


def kill_in_rollout() -> None:
    for engine in (TorchEngine, MaskedTorchEngine):
        engine.generate = dying(engine.generate, 3)  # the third rollout, after a checkpoint inside the second


def kill_in_scoring() -> None:
    CompositeReward.score = dying(CompositeReward.score, 4)


def kill_in_update() -> None:
    StageTrainer.compute_loss = dying(StageTrainer.compute_loss, 4 + 8 + 7)  # codec 4, sft 8, then inside GRPO


def kill_in_update_of_two() -> None:
    # Each of two processes has half of SFT's micro-batches and one a step of GRPO; its fourth is between checkpoints.
    StageTrainer.compute_loss = dying(StageTrainer.compute_loss, 4 + 4 + 4)


def kill_in_save() -> None:
    def torn(folder: Path) -> None:
        (folder / "optimizer.pt").write_bytes(b"torn")
        die()

    sealed, write_manifest = [0], trainer_module.write_manifest

    def seal(folder: Path) -> None:
        sealed[0] += 1
        torn(folder) if sealed[0] == 6 else write_manifest(folder)  # codec 2, sft 2, GRPO's second

    trainer_module.write_manifest = seal


def kill_in_save_of_two() -> None:
    """Of the second checkpoint of GRPO, where this process has written its part, and nothing is sealed yet."""
    trainer_module._Seal.on_save = before(trainer_module._Seal.on_save, 2 + 2 + 2, die)  # codec 2, sft 2, GRPO's second


def kill_after_the_last_step() -> None:
    # Every step is checkpointed, and the result is not written yet.
    grpo_module.save_result = dying(lambda *_: None, 1)


def kill_between_stages() -> None:
    mark = RunFolder.mark

    def marked(self: RunFolder, name: str, kind: str, status: str, *rest: Any) -> None:
        mark(self, name, kind, status, *rest)
        if name == "sft" and status == "done":
            die()

    RunFolder.mark = marked  # pyrefly: ignore


def kill_in_pairs() -> None:
    samples_module.write_trajectory = dying(samples_module.write_trajectory, 2)  # the second of three batches


def kill_in_pair_files() -> None:
    pairs_module.write_pairs = dying(pairs_module.write_pairs, 1)


def kill_in_reference() -> None:
    reference_module._write = dying(reference_module._write, 2)


def kill_in_dpo() -> None:
    StageTrainer.compute_loss = dying(StageTrainer.compute_loss, 4 + 8 + 5)  # codec 4, sft 8, then after a checkpoint


def kill_in_evaluation() -> None:
    evaluate_module.sample_held_out = dying(evaluate_module.sample_held_out, 2)


def kill_in_export() -> None:
    export_module._replace = dying(export_module._replace, 2)


def stop_in_update() -> None:
    """Asked after the fifth step has begun: between checkpoints, inside a rollout, of a step with two micro-batches."""
    StageTrainer.compute_loss = asking(StageTrainer.compute_loss, 4 + 8 + 9, signal.SIGTERM)


def stop_in_update_of_two() -> None:
    StageTrainer.compute_loss = asking(StageTrainer.compute_loss, 4 + 4 + 4, signal.SIGUSR1)


def stop_in_pairs() -> None:
    samples_module._draw_batch = asking(samples_module._draw_batch, 1, signal.SIGTERM)


def stop_in_evaluation() -> None:
    evaluate_module.sample_held_out = asking(evaluate_module.sample_held_out, 2, signal.SIGINT)


def hang_in_update_of_two() -> None:
    """With steps longer than the time between two signs of life, so that the last one tells the step."""
    StageTrainer.compute_loss = slowed(StageTrainer.compute_loss, 1.0)
    StageTrainer.compute_loss = asking(StageTrainer.compute_loss, 4 + 4 + 4, signal.SIGSTOP)


def full_disk_in_checkpoint() -> None:
    """No file of more than 24 kB can be written from GRPO's last step on: the second checkpoint's optimizer."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, resource.RLIM_INFINITY))

    StageTrainer.compute_loss = after(StageTrainer.compute_loss, 4 + 8 + 12, limited)


def full_disk_of_two() -> None:
    """The same of two processes: what the one that writes checkpoints meets, and the other waits for."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, resource.RLIM_INFINITY))

    StageTrainer.compute_loss = after(StageTrainer.compute_loss, 4 + 4 + 6, limited)


PLACES: dict[str, Callable[[], None]] = {
    "codec": kill_in_codec,
    "sft": kill_in_sft,
    "stop": stop_in_update,
    "stop of two": stop_in_update_of_two,
    "stop in pairs": stop_in_pairs,
    "stop in evaluation": stop_in_evaluation,
    "hang of two": hang_in_update_of_two,
    "full": full_disk_in_checkpoint,
    "full of two": full_disk_of_two,
    "rollout": kill_in_rollout,
    "scoring": kill_in_scoring,
    "update": kill_in_update,
    "update of two": kill_in_update_of_two,
    "save": kill_in_save,
    "save of two": kill_in_save_of_two,
    "result": kill_after_the_last_step,
    "between": kill_between_stages,
    "pairs": kill_in_pairs,
    "pair files": kill_in_pair_files,
    "reference": kill_in_reference,
    "dpo": kill_in_dpo,
    "evaluation": kill_in_evaluation,
    "export": kill_in_export,
}


def digest(folder: Path) -> dict[str, str]:
    """A digest of every stage's weights, pairs, records and metrics (timings aside), of the evaluation and the
    export."""
    found: dict[str, str] = {}
    kept = ("stages/*/model/model.safetensors", "stages/*/codec/*.safetensors", "stages/*/pairs.parquet")
    kept += ("stages/*/margins.json", "stages/*/preferences.json")
    kept += ("merged/model.safetensors", "adapter/adapter_model.safetensors")
    for path in [path for pattern in kept for path in sorted(folder.glob(pattern))]:
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.glob("stages/*/metrics.jsonl")):
        rows = [
            {key: value for key, value in json.loads(line).items() if not key.startswith("time/")}
            for line in path.read_text().splitlines()
        ]
        found[str(path.relative_to(folder))] = json.dumps(rows, sort_keys=True)
    record = json.loads(next(folder.glob("stages/*/eval.json")).read_text())
    record.pop("compute")
    record.pop("compute_notes")
    found["eval"] = json.dumps(record, sort_keys=True)
    return found


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """What only one of the two has, or they have differently."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def main(out: Path, recipe: Path, count: int, places: list[str]) -> None:
    reference_module.CHUNK = 2  # pyrefly: ignore[bad-assignment]  # of every run here: some files, not one
    whole = out / "whole"
    status = run_forked(recipe, [f"run_dir={whole}"], out / "whole.log", count=count)
    if any(status):
        sys.exit(f"the uninterrupted run failed with {status}:\n{(out / 'whole.log').read_text()[-4000:]}")
    expected, report = digest(whole), {}
    for place in places:
        folder, log = out / place, out / f"{place}.log"

        def last_dies(rank: int, place: str = place) -> None:
            if rank == count - 1 or place.startswith("full"):  # the processes share the disk
                PLACES[place]()

        # Hangs alone are looked for within seconds: a loaded machine takes its time for the rest.
        settings = [f"run_dir={folder}", *(["runtime.hang_seconds=6"] if place.startswith("hang") else [])]
        statuses = run_forked(recipe, settings, log, count=count, prepare=last_dies)
        resumed = max(map(abs, run_forked(recipe, [f"run_dir={folder}"], log, count=count)))
        differing = [] if resumed else differences(expected, digest(folder))
        report[place] = {"killed": statuses[-1], "statuses": statuses, "resumed": resumed, "differing": differing}
        report[place]["log"] = log.read_text()[-9000:]
    print(json.dumps({"files": sorted(expected), "places": report}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
