"""The page "bring your own checkpoint", followed to the letter: its file, a checkpoint from outside, and a run."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlmm.codecs import build_codec, save_codec
from rlmm.config.codec import FsqCodec
from rlmm.config.recipe import validate_recipe
from rlmm.pipeline import run_recipe
from rlmm.policies.families.loading import find_family, load_policy
from rlmm.policies.families.tiny import published_tokenizer
from rlmm.train.metrics import MetricsFile

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text().split("## Bring your own checkpoint")[1]
CODES = 60
TRAINED = {"steps": 2, "learning_rate": 1.0e-3, "micro_batch_size": 4, "warmup_steps": 0}
ENTRY = """from rollouts.vllm_engine.plugin import MODELS

MODELS["Qwen3ForCausalLM"] = "my_vllm:Mine"


"""
SERVED = """from pathlib import Path

from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM


class Mine(Qwen3ForCausalLM):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        Path("served").touch()
"""
"""A class for vLLM that leaves a trace."""


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to start a run in: the page's file, and the checkpoint that it is about."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_family.py").write_text(block("python"))
    checkpoint = tmp_path / yaml.safe_load(block("yaml"))["policy"]["path"]
    special = {"<|bos|>": 0, "<|pad|>": 1, "<|image|>": 2, "<|end|>": 3}
    codes = {f"<|code {code}|>": 200 + code for code in range(CODES)}
    tokenizer = published_tokenizer(special, codes, bos="<|bos|>", eos="<|end|>", pad="<|pad|>")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=200 + CODES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=256,
        )
    )  # fmt: skip
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    codec = build_codec(FsqCodec(image_size=(48, 48), patch=(12, 12), levels=(4, 5, 3), width=8, blocks=0))
    save_codec(codec, checkpoint / "image_tokenizer")
    return tmp_path


def recipe(stages: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(block("yaml")) | {
        "name": "mine",
        "data": {"kind": "scenes", "train_images": 8, "held_out": 8, "prompts": 8},
        "rewards": {"terms": [{"name": "scenes"}]},
        "held_out": {"terms": [{"name": "scenes", "label": "verifier"}]},
        "stages": stages,
    }


def test_a_family_from_outside_runs_whole(folder: Path) -> None:
    raw = recipe(
        {
            "sft": {"kind": "sft", **TRAINED, "batch_size": 4},
            "grpo": {
                "kind": "grpo", **TRAINED, "prompts_per_step": 2, "samples_per_prompt": 2, "lora": {"rank": 2},
                "sampling": {"guidance_scale": 2.0}, "gates": {"duplicate_share": 1.0, "flat_share": 1.0},
            },
            "export": {"kind": "export", "start_from": "grpo"},
        }
    )  # fmt: skip
    run = run_recipe(validate_recipe(raw, "mine"), lambda line: None)
    policy = load_policy(run.path / "merged")
    assert policy.layout.family == "my_family.py:family" and isinstance(policy.base, Qwen3ForCausalLM)
    spelled = policy.tokenizer.convert_ids_to_tokens(policy.encode_prompt("a cat"))
    assert "".join(spelled) == "draw: a cat"


def test_a_file_that_returns_no_family_is_named(folder: Path) -> None:
    (folder / "wrong.py").write_text("def family():\n    return 3\n")
    with pytest.raises(ValueError, match=r"wrong.py:family returned a int; return a .*Family"):
        find_family("wrong.py:family")
    with pytest.raises(ValueError, match="there is no file nothing.py"):
        find_family("nothing.py:family")


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("own", [False, True], ids=["vLLM's class", "a class of one's own"])
def test_vllm_serves_it(folder: Path, own: bool) -> None:
    """A class that vLLM knows as it is; one that it does not by an entry in MODELS, which my_family.py makes."""
    raw = recipe(
        {
            "grpo": {
                "kind": "grpo", **TRAINED, "prompts_per_step": 2, "samples_per_prompt": 2, "lora": {"rank": 2},
                "sampling": {"guidance_scale": 2.0}, "gates": {"duplicate_share": 1.0, "flat_share": 1.0},
                "engine": {"kind": "vllm", "kv_megabytes": 32, "max_rows": 8, "max_prompt_tokens": 512},
            }
        }
    )  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(raw))
    (folder / "my_vllm.py").write_text(SERVED)
    if own:
        (folder / "my_family.py").write_text(ENTRY + block("python"))
    command = [sys.executable, "-m", "rlmm.cli", "run", "mine.yaml", f"run_dir={folder / 'run'}"]
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = MetricsFile(folder / "run" / "stages" / "01-grpo" / "metrics.jsonl").read()
    assert len(rows) == 2 and all(row["mismatch/max"] < 1e-4 for row in rows)
    assert (folder / "served").is_file() == own
