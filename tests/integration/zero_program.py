"""Policy stages of the tiny recipes, as one process and as two under ZeRO, in forked processes: `FOLDER CASE KIND...`.

KIND is `plain`, or a file in configs/deepspeed; `KIND+resumed` loses its processes in the middle of every stage and
goes on. Runs start from the same stages, the plain run's. Beside each run's folder lies KIND.json: what the loss of the
last GRPO stage went through.
"""

import json
import os
import shutil
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed  # noqa: F401  (once for all forks)
from torch import Tensor, nn

import rlmm.train.grpo as grpo
from rlmm import pipeline
from rlmm.config.recipe import Recipe, validate_recipe
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.context import StageContext
from rlmm.train.launch import check_deepspeed, processes
from rlmm.train.processes import wait
from rlmm.train.trainer import StageTrainer
from tests.integration.forked import fork_group

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


@dataclass(frozen=True)
class Case:
    """A recipe of tests/recipes, its stages that runs share, and those of which each run has its own."""

    recipe: str
    shared: tuple[str, ...]
    stages: dict[str, dict[str, Any]]
    policy: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    """Laid over the ZeRO settings of the shipped file."""


CASES = {
    "tiny": Case("tiny", ("codec", "sft"), {"more": SFT, "adapter": GRPO | {"lora": LORA}, "whole": GRPO}),
    "tied": Case(
        "tiny",
        ("codec", "sft"),
        {"more": SFT | {"gradient_checkpointing": True}, "whole": GRPO},
        {"tie_embeddings": True},
    ),
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
    "dpo": Case(
        "tiny_dpo",
        ("codec", "sft", "pairs"),
        {"adapter": DPO | {"lora": LORA}, "kto": DPO | {"loss": "kto"}, "held": DPO | {"loss": "kto", "lora": LORA}},
    ),
}
LAST = 3
"""The step (0-based) that a run which is to be resumed dies in, with the one before it lost: every second is kept."""


def recipe_of(folder: Path, case: Case, kind: str) -> Recipe:
    raw = yaml.safe_load((ROOT / "tests" / "recipes" / f"{case.recipe}.yaml").read_text())
    stages = {name: dict(stage) for name, stage in case.stages.items()}
    if kind != "plain":
        for stage in stages.values():
            stage["deepspeed"] = str(configuration(folder, kind, case.zero))
    shared = {name: raw["stages"][name] for name in case.shared}
    own = {"run_dir": str(folder), "stages": shared | stages, "policy": raw["policy"] | case.policy}
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
        seen |= {"whole": len(asked)}
        path.write_text(json.dumps(seen))
        return original(policy, config, model, *rest)

    grpo.grpo_loss = watched  # pyrefly: ignore
    TransformerPolicy.whole = noted  # pyrefly: ignore


def dying() -> None:
    """Lose this process in the step LAST."""
    original = StageTrainer.compute_loss

    def mortal(self: StageTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == LAST:
            os._exit(7)
        return original(self, *args, **kwargs)

    StageTrainer.compute_loss = mortal  # pyrefly: ignore


def run(folder: Path, case: Case, kind: str, death: str | None) -> None:
    """The stages that are not done yet; `death`: that one is not finished."""
    recipe = recipe_of(folder, case, kind)
    layout = pipeline.run_folder(recipe)
    watch(folder.with_suffix(".json"))
    with processes(deepspeed=kind != "plain"):
        for name, config in recipe.stages.items():
            if any((layout.stage(name) / made).exists() for made in ("model", "codec", "pairs.parquet")):
                continue
            if name == death:
                dying()
            layout.stage(name).mkdir(parents=True, exist_ok=True)
            pipeline.STAGES[config.kind](StageContext(recipe, layout, name, config, print))
            wait()


def main(place: Path, case: Case, kinds: list[str]) -> None:
    for name in kinds:
        kind, _, resumed = name.partition("+")
        folder = place / name
        folder.mkdir()
        if kind != "plain":
            for number, stage in enumerate(case.shared, start=1):
                own = f"stages/{number:02d}-{stage}"
                shutil.copytree(place / "plain" / own, folder / own)
        for death in [*(case.stages if resumed else ()), None]:
            log = place / f"{name}.log"
            statuses = fork_group(
                lambda rank, folder=folder, kind=kind, death=death: run(folder, case, kind, death),
                log,
                count=1 if kind == "plain" else 2,
            )
            if any(statuses) != (death is not None):
                raise SystemExit(f"{name}, death in {death}: {statuses}\n{log.read_text()[-8000:]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), CASES[sys.argv[2]], sys.argv[3:])
