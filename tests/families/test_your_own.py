"""The page "bring your own checkpoint", followed to the letter: its file, a checkpoint from outside, and a run."""

import re
from pathlib import Path

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

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text().split("## Bring your own checkpoint")[1]
CODES = 60


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
            num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
        )
    )  # fmt: skip
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    codec = build_codec(FsqCodec(image_size=(48, 48), patch=(12, 12), levels=(4, 5, 3), width=8, blocks=0))
    save_codec(codec, checkpoint / "image_tokenizer")
    return tmp_path


def test_a_family_from_outside_runs_whole(folder: Path) -> None:
    trained = {"steps": 2, "learning_rate": 1.0e-3, "micro_batch_size": 4, "warmup_steps": 0}
    raw = yaml.safe_load(block("yaml")) | {
        "name": "mine",
        "data": {"kind": "scenes", "train_images": 8, "held_out": 8, "prompts": 8},
        "rewards": {"terms": [{"name": "scenes"}]},
        "held_out": {"terms": [{"name": "scenes", "label": "verifier"}]},
        "stages": {
            "sft": {"kind": "sft", **trained, "batch_size": 4},
            "grpo": {
                "kind": "grpo", **trained, "prompts_per_step": 2, "samples_per_prompt": 2, "lora": {"rank": 2},
                "sampling": {"guidance_scale": 2.0}, "gates": {"duplicate_share": 1.0, "flat_share": 1.0},
            },
            "export": {"kind": "export", "start_from": "grpo"},
        },
    }  # fmt: skip
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
