"""The model card: front matter that parses, figures with intervals, and code that is code."""

import ast
import re
from dataclasses import replace

import yaml

from rlmm.export_card import CardInfo, HeldOut, model_card

INFO = CardInfo(
    name="words-grpo",
    kind="adapter",
    base="runs/quickstart/stages/02-sft/model",
    recipe="quickstart",
    stages=[("codec", "FSQ, 50 steps"), ("sft", "80 steps"), ("grpo", "120 steps")],
    objective="dr_grpo",
    data="1500 rendered words",
    reward="ocr: 1 - edit distance | letters",
    codec="FSQ 8x8",
    codec_path="codec",
    held_out=[HeldOut("tesseract", "exact", "grpo", 0.7, 0.7031, 0.65, 0.75, 256)],
    versions={"torch": "2.13.0", "peft": "0.21.2"},
    license="apache-2.0",
    seed=7,
)


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def code(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    ast.parse(found.group(1))
    return found.group(1)


def test_adapter_card_tells_where_it_comes_from_and_how_it_loads() -> None:
    card = model_card(INFO)
    front = front_matter(card)
    assert (front["library_name"], front["base_model"], front["license"]) == ("peft", INFO.base, "apache-2.0")
    assert "PeftModel.from_pretrained(base" in code(card) and repr(INFO.base) in code(card)
    assert "| grpo | 0.7 | exact | tesseract | 0.703 | [0.650, 0.750] | 256 |" in card
    assert "1. **codec**: FSQ, 50 steps" in card and "- torch 2.13.0" in card and "seed 7" in card


def test_merged_card_needs_no_peft() -> None:
    card = model_card(replace(INFO, kind="merged", held_out=(), license=None))
    front = front_matter(card)
    assert front["library_name"] == "transformers" and "license" not in front
    assert "peft" not in code(card).lower()
    assert "Not evaluated." in card


def test_free_text_stays_in_its_cell() -> None:
    card = model_card(replace(INFO, data="two\nlines | and a bar"))
    assert "| Data | two lines \\| and a bar |" in card
    hostile = replace(INFO, base='x"\nlicense: mit', name="n")
    assert front_matter(model_card(hostile))["base_model"] == hostile.base
