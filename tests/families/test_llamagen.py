"""LlamaGen, of which transformers has no class: ours against the published weights' own arithmetic."""

import argparse
import shutil
import string
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.sampling import Sampling, Written
from rlmm.config.stages import SftStage
from rlmm.dry_run import Live
from rlmm.dry_sampling import Drawing, sampled
from rlmm.policies.families.base import Checkpoint
from rlmm.policies.families.llamagen_convert import HEADS, convert
from rlmm.policies.families.loading import checkpoint_codec, layout_of, load_policy, load_spelling, outline
from rlmm.policies.layout_io import Supervised
from rlmm.policies.models.llamagen import GridRotary, LlamaGenConfig
from rlmm.policies.responses import response_of
from rlmm.policies.spelling import UnusablePrompt
from rlmm.train.sft import SftSource
from rollouts.law import Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Span
from rollouts.vllm_engine import configs
from tests.families import llamagen_original as original
from tests.families.checkpoints import facts, peaked, prompts, requests, tiny


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The published files, and the folder made of them: images of 32x32 pixels, 2x2 codes."""
    folder = tmp_path_factory.mktemp("llamagen")
    body, network = original.random_checkpoint(folder)
    convert(body, network, folder / "made", image_size=32)
    return body, network, folder / "made"


def saved(file: Path) -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True)["model"]


def test_a_converted_checkpoint_says_of_each_code_what_the_published_weights_say(
    converted: tuple[Path, Path, Path],
) -> None:
    weights = saved(converted[0])
    policy = load_policy(converted[2], CheckpointPolicy(path=str(converted[2])))
    codes, first = [5, 16383, 900], policy.layout.image[0]
    assert first == 1001
    for name, row in (("207", 207), (None, 1000)):
        prompt = policy.encode_prompt(name or "0")
        prefix = policy.layout.prefix(prompt if name else policy.layout.null(prompt))
        ids = torch.tensor([[*prefix, *(code + first for code in codes)]])
        with torch.no_grad():
            found = policy.head(policy.hidden(ids, torch.ones_like(ids).bool())[0], policy.layout.image)
            whole = policy.model.eval()(input_ids=ids).logits[0, :, first:]
        wanted = original.logits(weights, row, codes, heads=12, grid=2)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-4)
        assert float(wanted.std()) > 0.5


def test_a_converted_image_tokenizer_is_the_published_one(converted: tuple[Path, Path, Path]) -> None:
    weights, codec = saved(converted[1]), checkpoint_codec(CheckpointPolicy(path=str(converted[2])))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    codes = torch.tensor([[0, 9, 16383, 77], [4, 4, 4, 4]])
    assert codec.encode(images).equal(original.encode(weights, images * 2 - 1).flatten(1))
    pixels = codec.decode(codes)
    wanted = (original.decode(weights, codes.view(-1, 2, 2)) + 1) / 2
    torch.testing.assert_close(pixels, wanted.clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert 0.01 < float(pixels.std())


def test_every_published_size_is_told_by_its_weights() -> None:
    """Heads are in no file; the feed-forward's width is, and follows a rule."""
    stated = facts("llamagen")["config"]
    sizes = {name: size for name, size in stated.items() if name.startswith("gpt_") and isinstance(size, dict)}
    assert len(sizes) == len(HEADS) and all(HEADS[size["dim"]] == size["n_head"] for size in sizes.values())


def test_the_layout_is_the_published_one_behind_the_classes() -> None:
    stated, layout = facts("llamagen"), layout_of(tiny("llamagen").path, tiny("llamagen"))
    classes = stated["config"]["class_embedding_rows"]
    assert layout.text == (0, classes) and layout.null_token == stated["tokens"]["class_null"]
    assert layout.image == (classes, classes + stated["tokens"]["last_image"] + 1)
    assert (layout.prefix([207]), layout.prefix(layout.null([207])), layout.grid.length) == ((207,), (1000,), 9)
    spelled = load_spelling(tiny("llamagen").path, tiny("llamagen"))
    assert (spelled.encode("999"), spelled.encode(" 7\n")) == ([999], [7])
    for prompt in ("1000", "a cat", "<null>", "7 7"):
        with pytest.raises(UnusablePrompt, match="tokenizer does not know"):
            spelled.encode(prompt)
    fault = spelled.fault("207", 1)
    assert fault is not None and fault.reason == "source image for a family that draws from text alone"
    assert spelled.fault("207", 0) is None


def test_transformers_own_generate_draws_codes_alone() -> None:
    policy = peaked("llamagen")
    low, high = policy.layout.image
    ids = torch.tensor([[207], [8]])
    model = policy.base
    made = model.generate(ids, max_new_tokens=9, do_sample=False)  # pyrefly: ignore
    assert made.shape == (2, 10) and (made[:, 1:] >= low).all() and (made[:, 1:] < high).all()
    with torch.no_grad():
        hidden = policy.hidden(made[:, :-1], torch.ones_like(made[:, :-1]).bool())
    assert (policy.head(hidden, policy.layout.image).argmax(-1) + low).equal(made[:, 1:])


def test_a_code_turns_with_its_row_and_column_and_the_condition_vanishes() -> None:
    config = LlamaGenConfig(hidden_size=32, num_attention_heads=2, grid_size=3)
    cos, sin = GridRotary(config)(torch.zeros(1), torch.arange(10).unsqueeze(0))
    assert not cos[0, 0].any() and not sin[0, 0].any()
    angle = torch.atan2(sin, cos)[0, 1:, 0].view(3, 3)  # the fastest of the row's
    torch.testing.assert_close(angle, torch.arange(3.0)[:, None].expand(3, 3))
    angle = torch.atan2(sin, cos)[0, 1:, 4].view(3, 3)
    torch.testing.assert_close(angle, torch.arange(3.0)[None].expand(3, 3))


def test_files_that_do_not_go_together_are_named(converted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    body, network, _ = converted
    with pytest.raises(ValueError, match="in this order"):
        convert(network, body, tmp_path, image_size=32)
    with pytest.raises(ValueError, match="is not text-conditional: leave out text_encoder"):
        convert(body, network, tmp_path, image_size=32, text_encoder="t5")
    with pytest.raises(ValueError, match="is text-conditional: name its T5"):
        convert(original.random_checkpoint(tmp_path, layers=1, caption=16)[0], network, tmp_path, image_size=32)
    with pytest.raises(ValueError, match="16x16 pixels"):
        convert(body, network, tmp_path, image_size=40)
    broken = saved(body)
    del broken["layers.1.feed_forward.w3.weight"]
    torch.save(broken, tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"1 weights do not fit.*layers\.1\.mlp\.up_proj"):
        convert(tmp_path / "half.pt", network, tmp_path, image_size=32)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        convert(tmp_path / "text.pt", network, tmp_path, image_size=32)
    torch.save(Path("x"), tmp_path / "object.pt")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        convert(tmp_path / "object.pt", network, tmp_path, image_size=32)


def test_prompts_cannot_be_learned_without_a_head_for_them() -> None:
    policy = load_policy(tiny("llamagen").path, tiny("llamagen"))
    stage = SftStage(steps=1, learning_rate=1e-3, batch_size=1, micro_batch_size=1, text_weight=0.5)
    with pytest.raises(ValueError, match="learn no text .* set it to 0"):
        SftSource(policy.layout, [Supervised([7], [0] * 9)], stage, 0)
    with pytest.raises(ValueError, match="no head for text, so it cannot write any"):
        response_of(policy, Sampling(thought=Written(length_limit=3)))


def test_another_size_than_the_checkpoints_is_refused() -> None:
    options = tiny("llamagen").model_copy(update={"image_size": (64, 64)})
    with pytest.raises(ValueError, match="draws 48x48 pixels"):
        layout_of(options.path, options)
    assert Checkpoint(options.path, options).config.max_position_embeddings == 1 + 9


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The published text-conditional files, the T5 that goes with them, and the folder made of them."""
    folder = tmp_path_factory.mktemp("llamagen_text")
    body, network = original.random_checkpoint(folder, caption=16)
    torch.manual_seed(0)
    text = T5Config(vocab_size=32128, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.1)
    T5EncoderModel(text).save_pretrained(folder / "t5")
    letters = [("▁", -2.0), *((letter, -3.0) for letter in string.ascii_letters), ("▁a", -1.0)]
    T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0).save_pretrained(
        folder / "t5"
    )
    convert(body, network, folder / "made", image_size=32, text_encoder=str(folder / "t5"))
    return body, folder / "t5", folder / "made"


def test_a_converted_text_conditional_checkpoint_says_of_each_code_what_the_published_weights_say(
    worded: tuple[Path, Path, Path],
) -> None:
    """Prompts of other lengths in one batch, in both streams, also in training mode: T5 has dropout."""
    weights, text = saved(worded[0]), T5EncoderModel.from_pretrained(worded[1]).eval()
    policy = load_policy(worded[2], CheckpointPolicy(path=str(worded[2])))
    policy.model.train()
    codes, first, pad = [5, 16383, 900], policy.layout.image[0], policy.layout.pad
    prompts = [policy.encode_prompt(prompt) for prompt in ("a Red circle", "two blue squares on a cat", "a Red circle")]
    own: Any = AutoTokenizer.from_pretrained(worded[1])
    assert prompts[0] == own("a red circle").input_ids
    prefixes = [
        policy.layout.prefix(one)
        for null in (False, True)
        for one in (map(policy.layout.null, prompts) if null else prompts)
    ]
    width = max(map(len, prefixes))
    ids = torch.tensor([[pad] * (width - len(p)) + [*p, *(code + first for code in codes)] for p in prefixes])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * (len(p) + len(codes)) for p in prefixes])
    with torch.no_grad():
        found = policy.head(policy.hidden(ids, mask)[:, width - 1 :], policy.layout.image)
        for row, prompt in enumerate(prompts * 2):
            features = text(torch.tensor([prompt])).last_hidden_state[0]
            wanted = original.text_logits(weights, features, codes, heads=12, grid=2, null=row >= len(prompts))
            torch.testing.assert_close(found[row], wanted, rtol=1e-3, atol=1e-3)
    assert float((found[0] - found[1]).abs().max()) > 0.1 and float((found[0] - found[3]).abs().max()) > 0.1


def test_text_goes_through_the_whole_of_a_t5_that_nothing_trains(tmp_path: Path) -> None:
    policy = load_policy(tiny("llamagen_text").path, tiny("llamagen_text"))
    trained = {name for name, parameter in policy.base.named_parameters() if parameter.requires_grad}
    assert "model.captions.fc1.weight" in trained and not any("text_encoder" in n or "uncond" in n for n in trained)
    fault = policy.spelling.fault("a" * 120, 0)  # and T5's end
    assert fault is not None and fault.reason == "prompt too long for the model"
    assert policy.spelling.fault("a" * 119, 0) is None
    shutil.copytree(tiny("llamagen_text").path, tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    weights = {n: w for n, w in load_file(file).items() if "text_encoder.final_layer_norm" not in n}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the model's weights"):
        load_policy(tmp_path / "half", CheckpointPolicy(path=str(tmp_path / "half")))


def test_what_a_text_conditional_model_cannot_do_is_refused() -> None:
    policy = load_policy(tiny("llamagen_text").path, tiny("llamagen_text"))
    with pytest.raises(NotImplementedError, match="sample with rlmm"):
        policy.base.generate(torch.tensor([[21, 1]]))  # pyrefly: ignore


@pytest.mark.parametrize("caption", [None, {"vocab_size": 300, "d_model": 16, "pad_token_id": 0}])
def test_a_vllm_process_reads_the_configuration_without_the_trainers_class(caption: Any, tmp_path: Path) -> None:
    LlamaGenConfig(vocab_size=64, grid_size=4, caption_config=caption, caption_tokens=9).save_pretrained(tmp_path)
    ours, theirs = LlamaGenConfig.from_pretrained(tmp_path), configs.LlamaGenConfig.from_pretrained(tmp_path)
    for name in ("vocab_size", "grid_size", "first_code", "condition_tokens", "caption_tokens", "rope_parameters"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (theirs.caption_config is None) == (caption is None)
    if caption is not None:
        assert theirs.caption_config.to_dict() == ours.caption_config.to_dict() and theirs.first_code == 300


def test_sampling_of_classes_holds_what_is_planned() -> None:
    policy, options = load_policy(tiny("llamagen").path, tiny("llamagen")), tiny("llamagen")
    law = Law(policy.layout.image, guidance_scale=2.0)
    asked, length = requests(policy, prompts("llamagen")[:2], samples=24), policy.layout.grid.length
    width = len(asked[0].streams["cond"])
    drawing = Drawing(2, 4, width, 96, length, 48, "float32")
    engine = TorchEngine(policy, num_layers=policy.sizes.num_hidden_layers)
    with Live() as live:
        engine.generate(asked, [Span("image", law, length)])
    assert sampled(partial(outline, options), law, drawing) == pytest.approx(live.peak, rel=0.15)
