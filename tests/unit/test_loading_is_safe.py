"""Nothing that a published model brings is run: no code of its own, and no pickle."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from rewards.aesthetic import load_head
from rewards.checkpoints import load_model
from rewards.two_towers import TwoTowers
from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.families.loading import load_policy
from tests.exact.enumerable import make_policy
from tests.unit.test_structure import ROOT, SOURCES

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
}  # fmt: skip
RAN: list[str] = []


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return ran, ("the pickle",)


def ran(what: str) -> None:
    RAN.append(what)


@pytest.fixture(autouse=True)
def nothing_ran() -> Any:
    RAN.clear()
    yield
    assert not RAN


def pickled(folder: Path, config: Any) -> Path:
    """A model's folder whose weights are a pickle that runs code."""
    config.save_pretrained(folder)
    torch.save({"trap": Trap()}, folder / "pytorch_model.bin")
    return folder


def with_code(folder: Path) -> Path:
    """A model's folder that wants its own classes."""
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}})
    )
    (folder / "own.py").write_text("from tests.unit.test_loading_is_safe import RAN\nRAN.append('the code')\n")
    return folder


def test_weights_that_are_a_pickle_are_refused(tmp_path: Path) -> None:
    folder = pickled(tmp_path, LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]))
    with pytest.raises(OSError, match=r"a pickle \(pytorch_model.bin\).*save_pretrained"):
        load_model(LlamaForCausalLM, str(folder))


def test_a_policy_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    make_policy().save(tmp_path)
    load_policy(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"trap": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a readable checkpoint.*a pickle.*save_pretrained"):
        load_policy(tmp_path)


def test_a_reward_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    text = {**SMALL, "projection_dim": 8, "max_position_embeddings": 8}
    folder = pickled(tmp_path, CLIPConfig(text_config=text, projection_dim=8, architectures=["CLIPModel"]))
    with pytest.raises(OSError, match="a pickle"):
        TwoTowers(str(folder))


def test_a_model_without_weights_is_no_pickle(tmp_path: Path) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load_model(LlamaForCausalLM, str(tmp_path))


def test_safetensors_are_read(tmp_path: Path) -> None:
    model = CLIPModel(CLIPConfig(text_config=SMALL, vision_config={**SMALL, "image_size": 32, "patch_size": 16}))
    model.save_pretrained(tmp_path)
    again = load_model(CLIPModel, str(tmp_path))
    assert again.logit_scale.equal(model.logit_scale)


def test_code_in_a_model_is_not_run(tmp_path: Path) -> None:
    folder = with_code(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code|custom code"):
        TwoTowers(str(folder))
    with pytest.raises(ValueError, match="trust_remote_code|custom code"):
        load_policy(folder, CheckpointPolicy(path=str(folder)))


def test_a_head_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"layers.0.weight": Trap()}, tmp_path / "head.pth")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_head(tmp_path / "head.pth")


def calls(path: Path) -> list[tuple[str, dict[str, str]]]:
    """(what is called, its keyword arguments) of every call in a file."""
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(c.func), {k.arg or "**": ast.unparse(k.value) for k in c.keywords}) for c in found]


UNPICKLE = ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "dill.loads", "shelve.open", "pickle.Unpickler")
OBJECTS = (
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list", "gather_for_metrics",
)  # fmt: skip
"""What sends pickles over a process group, of torch and accelerate."""
PACKAGES = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "examples"]
ALWAYS = {"trust_remote_code": "False", "weights_only": "True", "allow_pickle": "False"}
"""What these settings are wherever they are given."""


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_load_says_that_it_is_safe(path: Path) -> None:
    for called, given in calls(path):
        assert called not in UNPICKLE
        assert called.rpartition(".")[2] not in OBJECTS
        assert {name: given[name] for name in ALWAYS if name in given}.items() <= ALWAYS.items()
        if called == "torch.load":
            assert "weights_only" in given
        if called.startswith("Auto") and called.endswith(".from_pretrained"):
            assert "trust_remote_code" in given
        if called.endswith(("Model.from_pretrained", "Pipeline.from_pretrained")):
            assert given.get("use_safetensors") == "True"
