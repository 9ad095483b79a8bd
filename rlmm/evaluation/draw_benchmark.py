"""A benchmark's prompts drawn by a checkpoint, in the layout of its official scripts."""

import json
from collections.abc import Callable
from pathlib import Path

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.sampling import Sampling
from rlmm.evaluation.benchmarks import BenchmarkError, read_benchmark
from rlmm.evaluation.layouts import SAMPLES, WRITERS
from rlmm.sampling import Drawer
from rlmm.train.checkpoint import file_digest, write_json_atomically

PROGRESS = ".drawn.json"
"""Beside the folder, so that the official scripts find nothing of ours in it: what is drawn with, and how far."""


def draw_benchmark(
    kind: str,
    file: Path,
    source: CheckpointPolicy,
    sampling: Sampling,
    out: Path,
    say: Callable[[str], None],
    *,
    samples: int | None = None,
    seed: int = 0,
    batch_prompts: int = 16,
) -> None:
    """`samples` pictures of each prompt of a benchmark's file (by default as many as its published numbers are of) in
    the folder `out`. A second call goes on after the last prompt that was written.

    Raises BenchmarkError for a prompt file that is none, a law that writes texts in place of pictures, and a folder
    that was begun with other settings.
    """
    prompts = read_benchmark(kind, file)
    if sampling.written is not None and sampling.answer is not None:
        raise BenchmarkError("an answer is a text, and a benchmark of pictures wants none; leave `answer` out")
    count = samples or SAMPLES[kind]
    record: dict[str, object] = {
        "kind": kind,
        "prompts": file_digest(file),
        "policy": source.model_dump(mode="json"),
        "sampling": sampling.model_dump(mode="json"),
        "samples": count,
        "seed": seed,
    }
    progress = out.with_name(out.name + PROGRESS)
    done = _drawn_before(progress, record, out)
    drawer = Drawer.of(source, sampling) if done < len(prompts) else None
    for first in range(done, len(prompts), batch_prompts):
        part = prompts[first : first + batch_prompts]
        assert drawer is not None, "made where anything is to be drawn"
        made = drawer.draw([item.prompt for item in part], count, seed=seed, first=first)
        for at, item in enumerate(part):
            WRITERS[kind](out, first + at, item, made.images[at * count : (at + 1) * count])
        write_json_atomically(progress, {**record, "done": first + len(part)})
        say(f"{first + len(part)} of {len(prompts)} prompts")
    say(f"{out} has {len(prompts)} prompts of {kind}, {count} pictures each")


def _drawn_before(progress: Path, record: dict[str, object], out: Path) -> int:
    """How many prompts a stopped call has written."""
    if not progress.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise BenchmarkError(f"{out} is not empty, and no call of this command left it so; give another folder")
        return 0
    before = json.loads(progress.read_text())
    done = before.pop("done")
    if changed := [key for key, value in record.items() if before.get(key) != value]:
        raise BenchmarkError(
            f"{out} was begun with another {', '.join(changed)}; a benchmark's pictures come from one law. Give "
            f"another folder, or delete it and {progress}"
        )
    return done
