"""What `vllm_program` compares with stock vLLM, and a stage under two engines."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from rlmm import pipeline
from rlmm.config.policy import Lora
from rlmm.config.recipe import validate_recipe
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.context import StageContext
from tests.integration.vllm_requests import PROMPTS, change


def stock_adapter(policy: TransformerPolicy, folder: Path) -> dict[str, float]:
    """The largest difference of log-probs, over a prompt and an image, between the trainer's model with its adapter and
    stock vLLM with the saved base and the saved adapter; and without the adapter."""
    policy.save(folder / "base")
    policy.add_lora(Lora(rank=8, target_modules=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")), seed=1)
    change(policy, 5)
    policy.save_adapter(folder / "adapter", str(folder / "base"))
    layout = policy.layout
    ids = [*layout.prefix(policy.encode_prompt(PROMPTS[1])), *range(layout.image[0], layout.image[0] + 12)]
    with torch.no_grad():
        logits_TV = policy.model(torch.tensor([ids])).logits[0]
    wanted_T = logits_TV.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    engine = LLM(
        model=str(folder / "base"), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=256,
        kv_cache_memory_bytes=32 << 20, enable_lora=True, max_lora_rank=8, max_loras=1,
    )  # fmt: skip

    def gap(adapter: LoRARequest | None) -> float:
        asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        (answer,) = engine.generate([{"prompt_token_ids": ids}], asked, lora_request=adapter, use_tqdm=False)
        entries: list[Any] = list(answer.prompt_logprobs or [])[1:]
        given = [entry[token].logprob for entry, token in zip(entries, ids[1:], strict=True)]
        return float((torch.tensor(given) - wanted_T).abs().max())

    found = {"with": gap(LoRARequest("trained", 1, str(folder / "adapter"))), "without": gap(None)}
    engine.llm_engine.engine_core.shutdown()
    return found


def stages(folder: Path, engines: list[dict[str, Any]], **settings: Any) -> list[list[dict[str, float]]]:
    """The GRPO metrics (timings aside) of the tiny recipe under each engine, from one SFT policy. `settings`: of the
    stage."""
    raw = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "tiny.yaml").read_text())
    raw["stages"] = {name: raw["stages"][name] for name in ("codec", "sft", "grpo")}
    raw["policy"]["hidden_size"] = 64
    found = []
    for engine in engines:
        raw["stages"]["grpo"] |= {"engine": engine, "steps": 4, **settings}
        recipe = validate_recipe(raw | {"run_dir": str(folder)}, "tiny")
        run = pipeline.run_folder(recipe)
        shutil.rmtree(run.stage("grpo"), ignore_errors=True)
        for name, config in recipe.stages.items():
            if not run.stage(name).is_dir():
                run.stage(name).mkdir(parents=True)
                pipeline.STAGES[config.kind](StageContext(recipe, run, name, config, lambda _: None))
        rows = [json.loads(line) for line in (run.stage("grpo") / "metrics.jsonl").read_text().splitlines()]
        found.append([{k: value for k, value in row.items() if not k.startswith("time/")} for row in rows])
    return found
