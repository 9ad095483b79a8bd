"""Stages of the tiny recipes, as one process and as two, in forked processes: `FOLDER CASE KIND...`.

KIND is `plain`, `two` (processes, without DeepSpeed), or a file in configs/deepspeed; `KIND+PLACE` loses its processes
in every stage, at one of PLACES, and goes on. Runs start from the same stages, the plain run's. Beside each run's
folder lie KIND.json: what the loss of the last GRPO stage went through, and KIND.wrapped.json: of every stage the class
of its model and the stage of ZeRO.
"""

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed  # noqa: F401  (once for all forks)
from torch import Tensor, nn

import rlmm.train.grpo as grpo
import rlmm.train.trainer as trainer
from rewards.compose import CompositeReward
from rlmm import pipeline
from rlmm.config.recipe import Recipe, validate_recipe
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.context import StageContext
from rlmm.train.launch import check_deepspeed, processes
from rlmm.train.processes import wait, world
from rlmm.train.trainer import StageTrainer
from rollouts.torch_engine.causal import TorchEngine
from tests.integration.forked import fork_group
from tests.integration.kill_driver import after

ROOT = Path(__file__).parents[2]
GRPO = {
    "kind": "grpo", "start_from": "sft", "steps": 4, "prompts_per_step": 4, "samples_per_prompt": 4,
    "micro_batch_size": 2, "checkpoint_every": 2, "max_grad_norm": 0.02, "learning_rate": 1e-3,
    "objective": {"name": "grpo", "updates_per_rollout": 2, "kl": {"kind": "k3", "coefficient": 0.05}},
    "sampling": {"temperature": 1.0, "guidance_scale": 1.5},
}  # fmt: skip
LORA = {"rank": 4, "alpha": 4, "target_modules": ["q_proj", "down_proj", "lm_head"]}
SFT = {
    "kind": "sft", "start_from": "sft", "steps": 4, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3,
    "checkpoint_every": 2, "text_weight": 0.1,
}  # fmt: skip
DPO = {
    "kind": "dpo", "pairs": "pairs", "start_from": "sft", "steps": 4, "batch_size": 4, "micro_batch_size": 1,
    "learning_rate": 1e-3, "checkpoint_every": 2,
}  # fmt: skip
THOUGHT = {"thought": {"length_limit": 6, "template": "think: {prompt}", "stop": ["<eos>", "e"]}, "guidance_scale": 1.5}
STEPS_SEEN = {"sampling": {"guidance_scale": 1.5, "unmasking": {"steps": 3}}}
SERVER = {"kind": "vllm_server", "kv_megabytes": 32, "max_rows": 16}
NOISE = {"objective": {"name": "gspo", "clip_low": 0.2, "clip_high": 0.2}, "estimator": {"kind": "stratified"}}


CODEC = {"codec": {"kind": "codec", "steps": 4, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_every": 2}}
TRAINED = {"more": SFT, "adapter": GRPO | {"lora": LORA}, "whole": GRPO}
AGAIN, ROUNDED = {"gradient_checkpointing": True}, {"precision": "bfloat16"}


@dataclass(frozen=True)
class Case:
    """A recipe of tests/recipes, its stages that runs share, and those of which each run has its own."""

    recipe: str
    shared: tuple[str, ...]
    stages: dict[str, dict[str, Any]]
    policy: dict[str, Any] = field(default_factory=dict)
    codec: dict[str, Any] = field(default_factory=dict)
    """A codec of another kind, but for its sizes."""
    zero: dict[str, Any] = field(default_factory=dict)
    """Laid over the ZeRO settings of the shipped file."""


CASES = {
    "tiny": Case("tiny", ("codec", "sft"), TRAINED),
    "tied": Case(
        "tiny",
        ("codec", "sft"),
        {"more": SFT | {"gradient_checkpointing": True}, "whole": GRPO},
        {"tie_embeddings": True},
    ),
    "sizes": Case(
        "tiny",
        ("codec", "sft"),
        {"adapter": SFT | {"lora": {"rank": 16}}, "whole": SFT},
        {"hidden_size": 256, "intermediate_size": 512},
    ),
    "deaths": Case("tiny", ("codec", "sft"), {"adapter": GRPO | {"lora": LORA}, "whole": GRPO}),
    "recomputed": Case("tiny", ("codec", "sft"), {name: stage | AGAIN for name, stage in TRAINED.items()}),
    "bfloat16": Case("tiny", ("codec", "sft"), {name: stage | ROUNDED for name, stage in TRAINED.items()}),
    "thought": Case("tiny_thought", ("codec", "sft"), {"whole": GRPO | {"sampling": THOUGHT}}),
    "served": Case("tiny", ("codec", "sft"), {"adapter": GRPO | {"lora": LORA, "engine": SERVER}}, {"hidden_size": 64}),
    "masked": Case(
        "tiny_masked",
        ("codec", "sft"),
        {
            "more": SFT | {"noise": {"schedule": "cosine"}},
            "adapter": GRPO | STEPS_SEEN | {"lora": LORA},
            "noise": GRPO | STEPS_SEEN | NOISE,
        },
    ),
    "fsq": Case("tiny", (), CODEC),
    "vq": Case("tiny", (), CODEC, codec={"kind": "vq", "codebook_size": 64, "code_dim": 8}),
    "lfq": Case("tiny", (), CODEC, codec={"kind": "lfq", "bits": 6}),
    "dpo": Case(
        "tiny_dpo",
        ("codec", "sft", "pairs"),
        {
            "adapter": DPO | {"lora": LORA},
            "kto": DPO | {"loss": "kto"},
            "held": DPO | {"loss": "kto", "lora": LORA},
            "whole": DPO,
            "taught": SFT | {"lora": LORA},
        },
    ),
}
CODEC_SIZES = ("image_size", "channels", "patch", "width", "blocks")
WITHOUT = ("plain", "two")
"""Kinds that no file is laid out for."""
LAST = 3
"""The step (0-based) that a run which is to be resumed dies in, with the one before it lost: every second is kept."""


def recipe_of(folder: Path, case: Case, kind: str) -> Recipe:
    raw = yaml.safe_load((ROOT / "tests" / "recipes" / f"{case.recipe}.yaml").read_text())
    stages = {name: dict(stage) for name, stage in case.stages.items()}
    if kind not in WITHOUT:
        for stage in stages.values():
            stage["deepspeed"] = str(configuration(folder, kind, case.zero))
    shared = {name: raw["stages"][name] for name in case.shared}
    own = {"run_dir": str(folder), "stages": shared | stages, "policy": raw["policy"] | case.policy}
    if case.codec:
        own["codec"] = {name: raw["codec"][name] for name in CODEC_SIZES} | case.codec
    return validate_recipe(raw | own, case.recipe)


def configuration(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    """The shipped file, made to keep also tiny weights in parts. Every process writes the same, whole at any time."""
    made = json.loads((ROOT / "configs" / "deepspeed" / f"{kind}.json").read_text())
    made["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} | settings
    path = folder.parent / f"{kind}.deepspeed.json"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(made))
    partial.replace(path)
    check_deepspeed(path)
    return path


def watch(path: Path) -> None:
    """Note what the GRPO loss goes through, how much of its weights a process holds between its modules, and how often
    all of them were asked for by then."""
    original, gather, asked = grpo.grpo_loss, TransformerPolicy.whole, list[None]()

    def noted(policy: TransformerPolicy) -> AbstractContextManager[None]:
        asked.append(None)
        return gather(policy)

    def watched(policy: Any, config: Any, model: nn.Module, *rest: Any) -> Tensor:
        there = sum(parameter.numel() for parameter in model.parameters())
        seen = {"kind": type(model).__name__, "processes": int(os.environ.get("WORLD_SIZE", "1")), "there": there}
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        seen |= {"whole": len(asked), "recomputes": recomputes}
        path.write_text(json.dumps(seen))
        return original(policy, config, model, *rest)

    grpo.grpo_loss = watched  # pyrefly: ignore
    TransformerPolicy.whole = noted  # pyrefly: ignore


def note_models(path: Path) -> None:
    """Note what every stage's loss is computed with; a run that goes on adds to it."""
    original = StageTrainer.compute_loss

    def noted(self: StageTrainer, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        if world()[0] == 0:
            seen = json.loads(path.read_text()) if path.is_file() else {}
            zero = model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else None
            seen[Path(str(self.args.output_dir)).parent.name] = [type(model).__name__, zero]
            path.write_text(json.dumps(seen))
        return original(self, model, *args, **kwargs)

    StageTrainer.compute_loss = noted  # pyrefly: ignore


def die() -> None:
    os._exit(7)


def in_step(event: Callable[[], None]) -> None:
    """An event of each process in the step LAST."""
    original = StageTrainer.compute_loss

    def mortal(self: StageTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == LAST:
            event()
        return original(self, *args, **kwargs)

    StageTrainer.compute_loss = mortal  # pyrefly: ignore


def in_rollout() -> None:
    """One process alone, once it has drawn the second rollout."""
    if world()[0]:
        TorchEngine.generate = after(TorchEngine.generate, 2, die)


def in_scoring() -> None:
    """Of the second rollout; the first one's samples go to the held-out judge, too."""
    if world()[0]:
        CompositeReward.score = after(CompositeReward.score, 3, die)


def in_save() -> None:
    """With the last file torn, of DeepSpeed's the other process's, and the second checkpoint not sealed."""
    seal, sealed = trainer.write_manifest, list[Path]()

    def torn(folder: Path) -> None:
        sealed.append(folder)
        if len(sealed) < 2:
            return seal(folder)
        max(folder.rglob("*.pt"), key=lambda path: path.name).write_bytes(b"torn")
        die()

    trainer.write_manifest = torn


def full_disk() -> None:
    """No file of more than 100 kB can be written, by no process: a whole model, and no log."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


PLACES: dict[str, Callable[[], None]] = {
    "resumed": lambda: in_step(die),
    "rollout": in_rollout,
    "scoring": in_scoring,
    "save": in_save,
    "full": lambda: in_step(full_disk),
}


said = partial(print, flush=True)
"""What a stage says is there however its process ends."""


def run(folder: Path, case: Case, kind: str, death: str | None, place: str = "resumed") -> None:
    """The stages that are not done yet; `death`: that one is not finished, for what happens at `place`."""
    recipe = recipe_of(folder, case, kind)
    layout = pipeline.run_folder(recipe)
    watch(folder.with_suffix(".json"))
    if place != "full":
        note_models(folder.with_suffix(".wrapped.json"))
    with processes(deepspeed=kind not in WITHOUT):
        for name, config in recipe.stages.items():
            if any((layout.stage(name) / made).exists() for made in ("model", "codec", "pairs.parquet")):
                continue
            if name == death:
                PLACES[place]()
            layout.stage(name).mkdir(parents=True, exist_ok=True)
            pipeline.STAGES[config.kind](StageContext(recipe, layout, name, config, said))
            wait()


def main(place: Path, case: Case, kinds: list[str]) -> None:
    for name in kinds:
        kind, _, at = name.partition("+")
        folder = place / name
        folder.mkdir()
        if kind != "plain":
            for number, stage in enumerate(case.shared, start=1):
                own = f"stages/{number:02d}-{stage}"
                shutil.copytree(place / "plain" / own, folder / own)
        large = [name for name, stage in case.stages.items() if "lora" not in stage]
        for death in [*((large if at == "full" else case.stages) if at else ()), None]:
            log = place / f"{name}.log"
            statuses = fork_group(
                lambda rank, folder=folder, kind=kind, death=death, at=at: run(folder, case, kind, death, at),
                log,
                count=1 if kind == "plain" else 2,
            )
            if any(statuses) != (death is not None):
                raise SystemExit(f"{name}, death in {death}: {statuses}\n{log.read_text()[-8000:]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), CASES[sys.argv[2]], sys.argv[3:])
