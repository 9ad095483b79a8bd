"""Draw with an exported adapter: transformers and PEFT alone make the tokens, the codec makes the picture.

python examples/load_adapter.py runs/quickstart 'render "HELLO"' hello.png
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlmm.codecs import load_codec, tensor_to_images


def draw(run: Path, prompt: str, seed: int = 0) -> torch.Tensor:
    """Codes [1, rows * cols] sampled at temperature 1 from base/ with adapter/ on top."""
    layout = json.loads((run / "adapter" / "layout.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "base"), str(run / "adapter"))
    text = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = torch.tensor([[layout["bos"], *text, *layout["boi"]]])
    low, high = layout["image"]
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=layout["grid"]["rows"] * layout["grid"]["cols"],
        prefix_allowed_tokens_fn=lambda row, so_far: list(range(low, high)),
    )
    return output[:, ids.shape[1] :] - low


def main(run: str, prompt: str, out: str) -> None:
    codes = draw(Path(run), prompt)
    with torch.no_grad():
        (image,) = tensor_to_images(load_codec(Path(run) / "adapter" / "codec").decode(codes))
    image.save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
