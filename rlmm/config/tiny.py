"""`model=tiny`: a recipe on a random policy of its own kind and a handful of rows, to see in a minute that it runs.

Everything that decides how a recipe works (stages, objective, law, adapter, rewards of generated data) stays; sizes and
counts shrink. Rows of the user's own and the judges that need a server are replaced by generated scenes and their exact
verifier, since neither is at hand on a first try.
"""

from collections.abc import Callable, Mapping
from typing import Any

OVERRIDE = "model=tiny"
SIZE = (48, 48)
"""Pixels of a generated scene, which every family's tokenizer divides."""

STEPS = 4
"""Most forward passes an image of a masked checkpoint."""
BLOCK = 16
"""Fewest positions of a block, so that there are no more blocks than steps."""


def tiny_recipe(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe in small. Plain data in and out, not validated yet."""
    policy, data = dict(raw.get("policy") or {}), dict(raw.get("data") or {})
    made = dict(raw) | {"stages": {name: _stage(dict(stage)) for name, stage in dict(raw.get("stages") or {}).items()}}
    made["run_dir"] = f"runs/{raw.get('name')}-tiny"
    if policy.get("kind") == "checkpoint":
        policy |= {"tiny": True, "image_size": list(SIZE)}
        for setting in ("decoder", "image_tokenizer"):  # a tiny instance brings its own
            policy.pop(setting, None)
        made["stages"] = {name: _few_steps(stage) for name, stage in made["stages"].items()}
    else:
        policy |= {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
    if data.get("kind") == "rows":
        variant = "edit" if data.get("sources_column") else "text_to_image"
        data = {"kind": "scenes", "variant": variant}
        made["rewards"] = {"terms": [{"name": "scenes"}]}
        made["held_out"] = {"terms": [{"name": "scenes", "label": "verifier"}]}
    data |= {"train_images": 16, ("held_out_words" if data.get("kind") == "words" else "held_out"): 16}
    return made | {"policy": policy, "data": data}


def _stage(stage: dict[str, Any]) -> dict[str, Any]:
    return STAGES.get(str(stage.get("kind")), dict)(stage)


def _trained(stage: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {"steps": 2, "warmup_steps": 0, "deepspeed": None}
    if stage.get("lora"):
        small["lora"] = dict(stage["lora"]) | {"rank": 4}
    return stage | small


def _codec(stage: dict[str, Any]) -> dict[str, Any]:
    return _trained(stage) | {"steps": 4, "batch_size": 8, "images": None}


def _sft(stage: dict[str, Any]) -> dict[str, Any]:
    return _trained(stage) | {"batch_size": 4, "micro_batch_size": 4, "images": None}


def _grpo(stage: dict[str, Any]) -> dict[str, Any]:
    updates = dict(stage.get("objective") or {}).get("updates_per_rollout", 1)
    samples = max(2, updates)
    return _trained(stage) | {
        "sampling": _short(dict(stage.get("sampling") or {})),
        "prompts_per_step": 2,
        "samples_per_prompt": samples,
        "micro_batch_size": 2 * samples // updates,
        "engine": {"kind": "torch"},
        # A random policy earns the same for everything that it draws.
        "gates": dict(stage.get("gates") or {}) | {"flat_share": 1.0, "duplicate_share": 1.0},
    }


def _pairs(stage: dict[str, Any]) -> dict[str, Any]:
    # A random policy's pictures all read the same, and no two are of the same size.
    told = {"margin": 0.0} | ({} if stage.get("judge") else {"rewards": {"terms": [{"name": "jpeg_size"}]}})
    if stage.get("rollouts"):
        return stage | told
    # Most of its answers come to no end, and such make no pair.
    lengths = {"judge": 16, "understanding": 64}
    asked = {name: _asked(dict(stage[name]), length) for name, length in lengths.items() if stage.get(name)}
    count = max(6 if "understanding" in asked else 2, 2 * stage.get("pairs_per_prompt", 1))
    drawn = {"prompts": 6, "samples_per_prompt": count, "batch_prompts": 3, "engine": {"kind": "torch"}}
    return stage | drawn | told | asked | {"sampling": _short(dict(stage.get("sampling") or {}))}


def _asked(asked: dict[str, Any], length: int) -> dict[str, Any]:
    # None of its answers is right, and no two are as wrong; the likeliest would be the same about every picture.
    answer = dict(asked.get("answer") or {}) | {"length_limit": length, "top_k": 0, "temperature": 1.0}
    return asked | {"answer": answer, "rewards": {"terms": [{"name": "anls", "options": {"threshold": 1.0}}]}}


def _dpo(stage: dict[str, Any]) -> dict[str, Any]:
    return _trained(stage) | {"batch_size": 4, "micro_batch_size": 2}


def _short(sampling: dict[str, Any]) -> dict[str, Any]:
    """A random policy ends no text, so the limit is what is written."""
    return {k: v | {"length_limit": 8} if k in ("thought", "answer") and v else v for k, v in sampling.items()}


def _few_steps(stage: dict[str, Any]) -> dict[str, Any]:
    """Of a masked checkpoint, whose tiny image has as few as 9 positions for a step to reveal one."""
    if stage.get("kind") == "rounds":
        return stage | {"stages": {name: _few_steps(one) for name, one in stage["stages"].items()}}
    if isinstance(stage.get("sampling"), dict):
        stage = stage | {"sampling": _few_steps(stage["sampling"])}
    if isinstance(stage.get("estimator"), dict) and stage["estimator"].get("steps"):
        stage = stage | {"estimator": stage["estimator"] | {"steps": min(STEPS - 1, stage["estimator"]["steps"])}}
    unmasking = stage.get("unmasking")
    if not isinstance(unmasking, dict) or not isinstance(unmasking.get("steps"), int):
        return stage
    few = {"steps": min(STEPS, unmasking["steps"])}
    blocks = {"block": max(BLOCK, unmasking["block"])} if unmasking.get("block") else {}
    return stage | {"unmasking": unmasking | few | blocks}


def _eval(stage: dict[str, Any]) -> dict[str, Any]:
    return _short(stage) | {"prompts": 4, "skip": 0, "sampling_seeds": 1, "temperatures": [1.0]}


def _rounds(stage: dict[str, Any]) -> dict[str, Any]:
    return stage | {"stages": {name: _stage(dict(one)) for name, one in dict(stage.get("stages") or {}).items()}}


STAGES: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "codec": _codec,
    "sft": _sft,
    "grpo": _grpo,
    "pairs": _pairs,
    "dpo": _dpo,
    "rounds": _rounds,
    "eval": _eval,
}
