"""A small run folder of made-up figures and real images, for the tests of the report."""

import json
import math
import random
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from PIL import Image, ImageDraw, ImageFont

WORDS = "AMBER RIVER STONE MAPLE CLOUD TIGER LEMON OCEAN PIANO GLASS HONEY FOREST".split()
ARMS = {"sft": 0.45, "sft-more": 0.52, "grpo": 0.8}
TEMPERATURES = (1.0, 0.7, 0.4)


def png(text: str, size: tuple[int, int] = (96, 32), left: int = 5) -> bytes:
    """A PNG of `text` in black on white."""
    image = Image.new("L", size, 255)
    ImageDraw.Draw(image).text((left, 4), text, fill=0, font=ImageFont.load_default(size=20))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def build_run(folder: Path, *, grpo_steps: int = 40, finished: bool = True) -> Path:
    """Writes the folder; with `finished` false the run stands in the middle of GRPO, its last line torn."""
    folder.mkdir(parents=True, exist_ok=True)
    grpo = {
        "kind": "grpo",
        "prompts_per_step": 16,
        "samples_per_prompt": 8,
        "micro_batch_size": 64,
        "objective": {"name": "grpo", "updates_per_rollout": 2},
        "gates": {"mismatch_mean": 1e-5, "mismatch_max": None, "flat_share": 0.98},
    }
    config = {"name": "quickstart", "seed": 7, "stages": {"codec": {"kind": "codec"}, "grpo": grpo}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {"python": "3.11", "packages": {"torch": "2.13.0", "peft": "0.21.2"}, "devices": ["cpu"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    _codec(_stage(folder, "01-codec", "codec", 0, 40))
    _metrics(_stage(folder, "02-sft", "sft", 40, 130), _sft_lines())
    rl = _stage(folder, "03-grpo", "grpo", 130, 400 if finished else None)
    _metrics(rl, _grpo_lines(grpo_steps))
    for step in (0, grpo_steps // 2, grpo_steps - 1):
        _rollouts(rl / "rollouts" / f"step-{step:06d}.parquet", step, step / grpo_steps)
    if finished:
        evaluation = _stage(folder, "04-eval", "eval", 400, 460)
        (evaluation / "eval.json").write_text(json.dumps(_evaluation()))
        write_samples(evaluation / "samples.parquet")
        write_reference(evaluation / "reference.parquet", {word: png(word) for word in WORDS})
    else:
        with (rl / "metrics.jsonl").open("a") as handle:
            handle.write('{"step": 40, "reward/me')
    return folder


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows to a parquet file, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_samples(path: Path, prompts: Iterable[str] = tuple(f'render "{word}"' for word in WORDS)) -> None:
    """samples.parquet: every arm at every temperature, two seeds a prompt."""
    rng, rows = random.Random(0), []
    for arm, skill in ARMS.items():
        for temperature in TEMPERATURES:
            for seed in (0, 1):
                for prompt in prompts:
                    word = prompt.split('"')[1] if '"' in prompt else prompt
                    drawn = _misspelt(word, rng, skill + 0.15 * (1 - temperature))
                    rows.append(
                        {
                            "arm": arm,
                            "temperature": temperature,
                            "seed": seed,
                            "prompt": prompt,
                            "image": png(drawn),
                            "score/ocr": _overlap(word, drawn),
                            "score/tesseract": float(word == drawn),
                            "reading/tesseract": drawn,
                        }
                    )
    write_parquet(path, rows)


def write_reference(path: Path, pictures: Mapping[str, bytes]) -> None:
    """reference.parquet: the training pictures by prompt; the codec draws them alike."""
    kinds = ("training picture", "training picture through the codec")
    write_parquet(path, [{"kind": k, "prompt": p, "image": image} for k in kinds for p, image in pictures.items()])


def _stage(folder: Path, name: str, kind: str, started: int, finished: int | None) -> Path:
    path = folder / "stages" / name
    path.mkdir(parents=True)
    epoch = 1_700_000_000
    info = {
        "name": name[3:],
        "kind": kind,
        "status": "running" if finished is None else "done",
        "started": epoch + started,
        "finished": None if finished is None else epoch + finished,
    }
    (path / "stage.json").write_text(json.dumps(info))
    return path


def _metrics(stage: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _codec(stage: Path) -> None:
    lines = [
        {
            "step": step,
            "loss": 0.4 * math.exp(-step / 12) + 0.02,
            "psnr_db": 28 - 16 * math.exp(-step / 15),
            "codebook_use": 0.5 - 0.4 * math.exp(-step / 10),
            "codebook_perplexity": 210 - 190 * math.exp(-step / 12),
            "time/step": 0.7,
        }
        for step in range(1, 51)
    ]
    _metrics(stage, lines)
    grid = Image.new("L", (96 * 6, 64), 255)
    for column, word in enumerate(WORDS[:6]):
        tile = Image.open(BytesIO(png(word)))
        grid.paste(tile, (96 * column, 0))
        grid.paste(tile.resize((48, 16)).resize((96, 32)), (96 * column, 32))
    grid.save(stage / "reconstruction.png")


def _sft_lines() -> list[dict[str, float]]:
    rng = random.Random(1)
    lines = []
    for step in range(1, 81):
        loss = 3.2 * math.exp(-step / 25) + 0.3 + rng.gauss(0, 0.04)
        rate = 3e-3 * math.cos(step / 80 * math.pi / 2)
        lines.append(
            {
                "step": step,
                "loss": loss,
                "loss/image": loss,
                "learning_rate": rate,
                "grad_norm": 1 + rng.random(),
            }
        )
        lines[-1]["time/step"] = 1.0 + 0.1 * rng.random()
    return lines


def _grpo_lines(steps: int) -> list[dict[str, Any]]:
    rng, lines = random.Random(2), []
    for step in range(1, steps + 1):
        done = step / steps
        reward = 0.6 + 0.25 * done + rng.gauss(0, 0.025)
        line: dict[str, Any] = {
            "step": step,
            "reward/mean": reward,
            "reward/std": 0.28 - 0.1 * done,
            "reward/ocr/mean": reward,
            "group/flat_share": 0.02 + 0.3 * done**2 + 0.02 * rng.random(),
            "sample/unavailable_share": 0.0,
            "canary/drift": 0.0,
            "sample/invalid_share": 0.01 * rng.random(),
            "sample/duplicate_share": 0.03 + 0.2 * done**2,
            "mismatch/mean": 2e-7 * (1 + rng.random()),
            "mismatch/max": 4e-6 * (1 + rng.random()),
            "kl": 0.08 * done,
            "entropy": 1.1 - 0.6 * done,
            "clip_fraction": 0.01 + 0.03 * rng.random(),
            "ess": 0.98 - 0.02 * rng.random(),
            "grad_norm": 0.5 + 0.2 * rng.random(),
            "learning_rate": 2e-4,
            "loss": rng.gauss(0, 0.02),
            "diversity": 0.6 - 0.3 * done,
            "time/rollout": 2.0 + rng.random(),
            "time/score": 0.8 + 0.2 * rng.random(),
            "time/update": 2.2 + 0.3 * rng.random(),
        }
        if step % 2 == 0:
            line["held_out/tesseract/mean"] = reward - 0.14 + rng.gauss(0, 0.03)
        if step % 20 == 0:
            line["time/save"] = 1.5
        lines.append(line)
    return lines


def _rollouts(path: Path, step: int, skill: float) -> None:
    rng, rows = random.Random(step), []
    for group, word in enumerate(WORDS[:5]):
        drawn = [_misspelt(word, rng, 0.4 + 0.5 * skill) for _ in range(8)]
        rewards = [_overlap(word, text) for text in drawn]
        mean = sum(rewards) / 8
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 8) or 1.0
        for sample, (text, reward) in enumerate(zip(drawn, rewards, strict=True)):
            failed = group == 1 and sample == 3
            rows.append(
                {
                    "step": step,
                    "prompt": f'render "{word}"',
                    "group_id": f"{step}-{group}",
                    "sample_id": f"{step}-{group}-{sample}",
                    "image": None if group == 2 and sample == 0 else png(text, left=1 + sample),
                    "reward": None if failed else reward,
                    "reward_status": "unavailable" if failed else "ok",
                    "reward_reason": "the judge did not answer in 10 s" if failed else "",
                    "reward/ocr": None if failed else reward,
                    "advantage": None if failed else (reward - mean) / spread,
                    "ids": [1, 2, 3],
                }
            )
    write_parquet(path, rows)


def _evaluation() -> dict[str, Any]:
    rows, contrasts, diversity = [], [], []
    for judge, metric, shift in (("ocr", "similarity", 0.2), ("tesseract", "exact", 0.0)):
        for arm, skill in ARMS.items():
            for temperature in TEMPERATURES:
                mean = min(0.97, skill - 0.1 + shift + 0.25 * (1 - temperature) * (1.2 - skill))
                row = {"arm": arm, "temperature": temperature, "judge": judge, "metric": metric, "mean": mean}
                bounds = {"low": mean - 0.05, "high": mean + 0.05}
                rows.append(row | bounds | {"n_prompts": 256, "n_seeds": 2, "excluded": int(arm == "sft")})
        for baseline, best in (("sft", 0.23), ("sft-more", 0.16)):
            pair = {"arm": "grpo", "baseline": baseline, "judge": judge, "metric": metric}
            for at, difference in [*((t, best + 0.1 * (t - 0.4)) for t in TEMPERATURES), ("best", best)]:
                bounds = {"difference": difference, "low": difference - 0.06, "high": difference + 0.06}
                both = 0.4 if at == "best" else at
                contrasts.append(pair | bounds | {"at": str(at), "arm_temperature": both, "baseline_temperature": both})
    for arm, skill in ARMS.items():
        for temperature in TEMPERATURES:
            diversity.append({"arm": arm, "temperature": temperature, "value": temperature * (1 - skill / 2)})
    return {"rows": rows, "contrasts": contrasts, "diversity": diversity}


def _misspelt(word: str, rng: random.Random, skill: float) -> str:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    keep = 1 - (1 - min(0.98, skill)) * 0.5
    return "".join(letter if rng.random() < keep else rng.choice(letters) for letter in word)


def _overlap(word: str, drawn: str) -> float:
    return sum(a == b for a, b in zip(word, drawn, strict=True)) / len(word)
