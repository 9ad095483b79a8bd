"""HPSv2 and ImageReward from their published files: the key maps, and the published arithmetic at a small size."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from rewards import build
from rewards.base import Sample
from rewards.checkpoints import misfits
from rewards.conversions import hpsv2, image_reward
from rewards.gold import HasGold
from rewards.image_reward import ImageRewardModel
from rlmm.cli import app
from tests.unit import published_preference as published
from tests.unit.tiny_towers import TOKENS, write_clip

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's CLIP's, of red, green and blue."""
CLIP_SIZES = {
    49408: 54, 77: TOKENS, 1024: 128, 3072: 384, 4096: 64, 1280: 160, 3840: 480, 5120: 96, 257: 5, 14: 8,
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "cat", "dog", "sea", "of"]
BLIP_SIZES = {30524: len(WORDS) + 2, 768: 128, 512: 48, 1024: 192, 3072: 576, 4096: 96, 197: 5, 16: 8, 64: 24, 128: 32}
NOISE = np.random.default_rng(0).integers(0, 256, (4, 20, 31, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(pixels) for pixels in NOISE]
SIDE = 16
Made = tuple[dict[str, torch.Tensor], str, Any]


def saved(kind: str, sizes: dict[int, int], file: Path) -> dict[str, torch.Tensor]:
    weights = published.random_weights(kind, sizes)
    torch.save({"state_dict": weights, "epoch": 3} if kind == "hpsv2" else weights, file)
    return weights


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("hps")
    weights = saved("hpsv2", CLIP_SIZES, folder / "HPS_v2.1_compressed.pt")
    tokenizer = write_clip(folder / "clip")
    hpsv2.convert(folder / "HPS_v2.1_compressed.pt", folder / "made", tokenizer)
    return weights, str(folder / "made"), PreTrainedTokenizerFast.from_pretrained(tokenizer)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("blip")
    weights = saved("image_reward", BLIP_SIZES, folder / "ImageReward.pt")
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]")
    fast.save_pretrained(folder / "bert")
    command = ["reward", "convert", "image_reward", str(folder / "ImageReward.pt"), str(folder / "made")]
    done = CliRunner().invoke(app, [*command, "--tokenizer", str(folder / "bert")], catch_exceptions=False)
    assert done.exit_code == 0 and "wrote" in done.output
    return weights, str(folder / "made"), fast


def values(scores: Any) -> list[float]:
    return [score.value for score in scores]


def pixels(image: Image.Image) -> torch.Tensor:
    """Normalised [3, side, side] of a picture of that size."""
    scaled = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    return (torch.from_numpy(scaled) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


@pytest.mark.parametrize(
    ("kind", "conversion", "network"), [("hpsv2", hpsv2, CLIPModel), ("image_reward", image_reward, ImageRewardModel)]
)
def test_every_published_weight_has_its_place(kind: str, conversion: Any, network: Any) -> None:
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in published.published_names(kind).items()}
        config = conversion._config(weights, Path(kind))
        own = {name: tensor.shape for name, tensor in network(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in conversion._renamed(weights)} == own
    heads = config.vision_config.num_attention_heads, config.text_config.num_attention_heads
    assert (heads, config.vision_config.image_size) == ({"hpsv2": (16, 16), "image_reward": (16, 12)}[kind], 224)
    assert (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers) == (
        (32, 12) if kind == "hpsv2" else (24, 12)
    )


def test_hpsv2_is_the_cosine_of_the_published_weights(hps: Made) -> None:
    weights, folder, tokenizer = hps
    prompts = ["a red cat", "blue", "sea", "two dogs"]
    wanted = []
    for prompt, image in zip(prompts, IMAGES, strict=True):
        square = Image.new("RGB", (SIDE, SIDE))  # 31 x 20 becomes 16 x 10, with three black rows above and below
        square.paste(image.resize((16, 10), Image.Resampling.BICUBIC), (0, 3))
        wanted.append(published.hpsv2(weights, pixels(square), torch.tensor(tokenizer(prompt).input_ids)))
    samples = [Sample(str(at), "g", *pair) for at, pair in enumerate(zip(prompts, [(i,) for i in IMAGES], strict=True))]
    assert np.ptp(wanted) > 0.05
    assert values(build("hpsv2", model=folder).score(samples)) == pytest.approx(wanted, abs=1e-5)


def test_image_reward_is_the_mark_of_the_published_weights(blip: Made) -> None:
    weights, folder, tokenizer = blip
    prompts = ["a red cat", "blue", "sea of dog", "a cat of a blue sea"]
    squares = [image.resize((SIDE, SIDE)) for image in IMAGES]
    pairs = zip(prompts, squares, strict=True)
    wanted = [published.image_reward(weights, pixels(i), torch.tensor(tokenizer(p).input_ids)) for p, i in pairs]
    samples = [Sample(str(at), "g", prompt, (squares[at],)) for at, prompt in enumerate(prompts)]
    assert np.ptp(wanted) > 0.1, wanted
    for size in (1, 3, 16):  # prompts of other lengths beside it change nothing
        reward = build("image_reward", model=folder, batch_size=size)
        assert values(reward.score(samples)) == pytest.approx(wanted, abs=1e-3)
    both = Sample("b", "g", prompts[0], (squares[0], squares[1]))
    mean = (wanted[0] + values(reward.score([Sample("c", "g", prompts[0], (squares[1],))]))[0]) / 2
    scores = reward.score([both, Sample("d", "g", " ", (squares[0],)), Sample("e", "g", "sea"), samples[3]])
    assert [score.status for score in scores] == ["ok", "unavailable", "invalid_output", "ok"]
    assert values([scores[0], scores[3]]) == pytest.approx([mean, wanted[3]], abs=1e-3)
    assert isinstance(reward, HasGold) and len(reward.gold()) == 2


def test_a_prompt_beyond_35_tokens_is_cut_and_it_is_told(blip: Made) -> None:
    reward = build("image_reward", model=blip[1])
    texts = ["cat " * 33, "cat " * 33 + "sea", "cat " * 33 + "blue dog"]
    others = [*texts, "cat " * 32 + "sea"]
    *scores, other = reward.score([Sample(text, "g", text, (IMAGES[0],)) for text in others])
    assert [score.parts["cut"] for score in scores] == [0, 1, 1]
    first, *rest = values(scores)
    assert rest == pytest.approx([first, first], abs=1e-5)  # products round rows of a batch apart on some processors
    assert abs(values([other])[0] - first) > 1e-4


def test_scale_and_weights_are_in_the_fingerprint(blip: Made, tmp_path: Path) -> None:
    before = build("image_reward", model=blip[1]).fingerprint()
    config = json.loads((Path(blip[1]) / "config.json").read_text())
    assert (config["score_mean"], config["score_std"]) == (
        published.FACTS["image_reward"]["mean"],
        published.FACTS["image_reward"]["std"],
    )
    for file in Path(blip[1]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert build("image_reward", model=str(tmp_path)).fingerprint() == before
    (tmp_path / "config.json").write_text(json.dumps(config | {"score_mean": 0.0}))
    assert build("image_reward", model=str(tmp_path)).fingerprint() != before


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path("here").touch, ()


def test_what_is_no_such_file_says_so(hps: Made, blip: Made, tmp_path: Path) -> None:
    saved("hpsv2", CLIP_SIZES, tmp_path / "clip.pt")
    for what, message in (
        (tmp_path / "clip.pt", "no weights of a BLIP"),
        (tmp_path / "nowhere.pt", "cannot be read as tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            image_reward.convert(what, tmp_path / "out")
    torch.save({"state_dict": Runs()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        hpsv2.convert(tmp_path / "code.pt", tmp_path / "out")
    short = {name: tensor for name, tensor in hps[0].items() if name != "visual.ln_post.bias"}
    torch.save({"state_dict": short}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match="1 weights do not fit.*'vision_model.post_layernorm.bias'"):
        hpsv2.convert(tmp_path / "short.pt", tmp_path / "out", str(Path(hps[1])))
    assert not (tmp_path / "out").exists() and not Path("here").exists()
    with pytest.raises(ValueError, match="holds a model of type 'clip'.*convert image_reward"):
        build("image_reward", model=hps[1])


def test_what_does_not_fit_is_missing_superfluous_or_of_another_shape() -> None:
    model = torch.nn.Linear(3, 2)
    assert misfits(model, model.state_dict()) == []
    assert misfits(model, {"weight": torch.zeros(2, 4), "more": torch.zeros(1)}) == ["bias", "more", "weight"]
