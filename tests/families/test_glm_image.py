"""GLM-Image against transformers' own processor, positions, sampling and tokenizer, and diffusers' own pipeline."""

import math
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from transformers import GlmImageForConditionalGeneration, GlmImageImageProcessorPil, GlmImageProcessor

from rlmm.codecs import codec_hash, images_to_tensor, load_codec, save_codec
from rlmm.policies.families.base import Checkpoint
from rlmm.policies.families.glm_image import GlmImagePolicy, edit_layout, layout, preview_grid
from rlmm.policies.families.loading import checkpoint_codec, layout_of, load_policy
from rlmm.policies.layout_io import read_codes, spell_image
from rollouts.contract import Layout
from rollouts.law import Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Span
from tests.families.checkpoints import DIFFUSERS, facts, peaked, requests, tiny

NAMES = ("glm_image", "glm_image_edit")
needs_diffusers = pytest.mark.skipif(not DIFFUSERS, reason="diffusers, which has the decoder, is not installed")


def processor(folder: str) -> Any:
    tokenizer = Checkpoint(folder, tiny("glm_image")).tokenizer
    for name, token in (("image_token", "<|image|>"), ("grid_bos_token", "<sop>"), ("grid_eos_token", "<eop>")):
        setattr(tokenizer, name, token)
    # A side of 48 pixels and more is left as it is, then halved.
    pixels = GlmImageImageProcessorPil.from_pretrained(folder, size={"shortest_edge": 48**2, "longest_edge": 2048**2})
    return GlmImageProcessor(pixels, tokenizer)


def full_size(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Layout:
    """The layout of a model with the published patches."""
    checkpoint = Checkpoint(tiny(name).path, tiny(name).model_copy(update={"image_size": size}))
    config = checkpoint.config
    config.vision_config.patch_size = facts("glm_image")["config"]["vision_patch_size"]
    monkeypatch.setattr(Checkpoint, "config", config)
    return (layout if name == "glm_image" else edit_layout)(checkpoint)


@pytest.mark.parametrize("size", [(1024, 1024), (1152, 768), (512, 1024)])
def test_prompts_and_grids_are_the_processors(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    text, edit = (full_size(name, size, monkeypatch) for name in NAMES)
    own = processor(tiny("glm_image").path)
    grids = own._get_target_shape(*size)
    assert grids == (text.grid.rows, text.grid.cols, *cast(tuple[int, int], text.grid.preview))
    policy_ids = [20011, 20012]
    wanted = own(text=["ab"], target_h=size[0], target_w=size[1], return_tensors="pt")["input_ids"][0].tolist()
    assert [*text.prefix(policy_ids)] == wanted
    image = Image.new("RGB", (48, 48))
    spelled = "<|dit_token_16384|><|image|><|dit_token_16385|>ab"
    wanted = own(images=[image], text=[spelled], target_h=size[0], target_w=size[1], return_tensors="pt")["input_ids"][
        0
    ].tolist()
    source = [7] * wanted.count(167855) + [16385]
    assert [*edit.prefix(policy_ids, [source])] == [7 if token == 167855 else token for token in wanted]


def test_sizes_and_special_tokens_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = facts("glm_image")
    made = full_size("glm_image", (1024, 1024), monkeypatch)
    config, tokens = stated["config"], stated["tokens"]
    assert (made.grid.ahead, made.grid.rows * made.grid.cols) == (
        config["tokens_1024x1024_preview"], config["tokens_1024x1024_full"],
    )  # fmt: skip
    assert made.grid.length == config["max_new_tokens_1024x1024"]
    assert made.grid.forced() == {1280: tokens["image_end"]} and made.boi[-1] == tokens["image_start"]
    assert made.pad == tokens["pad"] and made.vocab_size == config["vocab_size"]
    assert made.image == (config["first_image_code"], config["last_image_code"] + 1)
    vocabulary = Checkpoint(tiny("glm_image").path, tiny("glm_image")).vocabulary
    assert (vocabulary["<sop>"], vocabulary["<eop>"]) == (tokens["<sop>"], tokens["<eop>"])
    assert vocabulary["<|image|>"] == tokens["image"] and vocabulary["<|dit_token_16383|>"] == 16383
    assert preview_grid(36, 24, 32) == (int(math.sqrt(1.5) * 16), int(math.sqrt(1 / 1.5) * 16))


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_those_of_transformers(name: str) -> None:
    """Of a prompt with and without padding, a source image where there is one, and every decided code."""
    policy = cast(GlmImagePolicy, load_policy(tiny(name).path, tiny(name)))
    model, spelled = cast(Any, policy.base).model, policy.layout
    codes = [[(7 * k) % 16384 for k in range(len(spelled.grid.decided()))]]
    sources = [spell_image(spelled, codes[0])] if spelled.takes_sources else []
    prefixes = [spelled.prefix(policy.encode_prompt(prompt), sources) for prompt in ("a cat", "two blue squares")]
    width = max(map(len, prefixes))
    image = spell_image(spelled, codes[0])
    ids = torch.tensor([[spelled.pad] * (width - len(p)) + [*p, *image] for p in prefixes])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * (len(p) + len(image)) for p in prefixes])
    own = [[1, spelled.grid.rows, spelled.grid.cols]]
    grids = own + ([[1, *spelled.grid.preview]] if spelled.grid.preview else own)
    before, _ = model.get_rope_index(
        ids[:, :width], image_grid_thw=torch.tensor(grids * 2), images_per_sample=torch.tensor([2, 2]),
        attention_mask=mask[:, :width],
    )  # fmt: skip
    after = model._cached_decode_position_ids.permute(1, 0, 2)
    found = policy.positions(ids, mask)
    assert found[:, :, :width][:, mask[:, :width]].equal(before[:, mask[:, :width]])
    assert found[:, :, width:].equal(after[:, :, : len(image)]) and after.shape[-1] == len(image)


@pytest.mark.parametrize("name", NAMES)
def test_it_draws_what_transformers_own_sampling_draws(name: str) -> None:
    """Greedy there, nearly so here."""
    policy = peaked(name)
    model, spelled = cast(GlmImageForConditionalGeneration, policy.base), policy.layout
    source = [spell_image(spelled, [(11 * k) % 16384 for k in range(36)])] if spelled.takes_sources else []
    cond, forced = spelled.prefix(policy.encode_prompt("a red circle"), source), spelled.grid.forced()
    own = [[1, spelled.grid.rows, spelled.grid.cols]]
    grids = own + ([[1, *spelled.grid.preview]] if spelled.grid.preview else own)

    def allowed(_: int, ids_T: torch.Tensor) -> list[int]:
        position = len(ids_T) - len(cond)
        return [forced[position]] if position in forced else list(range(*spelled.image))

    ids = torch.tensor([cond])
    theirs = cast(Any, model).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), image_grid_thw=torch.tensor(grids), do_sample=False,
        images_per_sample=torch.tensor([2]), max_new_tokens=spelled.grid.length, prefix_allowed_tokens_fn=allowed,
        eos_token_id=None,
    )  # fmt: skip
    (request,) = requests(policy, ["a red circle"], samples=1)
    bare = type(request)(request.group_id, {"cond": cond}, request.seeds, request.sample_ids)
    law = Law(spelled.image, temperature=1e-4)
    ours = TorchEngine(policy, num_layers=2).generate([bare], [Span("image", law, spelled.grid.length)])
    assert ours.ids.tolist() == theirs[:, len(cond) :].tolist()
    assert len(set(ours.ids[0].tolist())) > 5


def test_source_images_become_the_codes_that_transformers_makes() -> None:
    name = "glm_image_edit"
    policy, codec = load_policy(tiny(name).path, tiny(name)), checkpoint_codec(tiny(name))
    images = [
        Image.radial_gradient("L").resize((48, 48)).convert("RGB"),
        Image.effect_noise((48, 48), 90).convert("RGB"),
    ]
    pixels = processor(tiny(name).path).image_processor(images, return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 6, 6]] * 2
    model = cast(GlmImageForConditionalGeneration, policy.base)
    with torch.no_grad():
        seen = model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output  # pyrefly: ignore
        wanted = model.get_image_tokens(seen).view(2, 36)
        found = codec.encode(images_to_tensor(images, codec))
    assert found.unique().numel() > 20
    # Pillow rounds to 8 bits when it shrinks an image, torch does not.
    assert float((found == wanted).float().mean()) > 0.9


@needs_diffusers
def test_pixels_are_what_diffusers_own_pipeline_draws_and_a_function_of_the_images_codes() -> None:
    from diffusers import GlmImagePipeline

    codec = checkpoint_codec(tiny("glm_image"))
    codes = torch.randint(0, 16384, (2, 52), generator=torch.Generator().manual_seed(0))
    drawn = codec.decode(codes)
    pipeline: Any = GlmImagePipeline.from_pretrained(
        Path(tiny("glm_image").path) / "decoder", vision_language_encoder=None, processor=None
    )
    twice = pipeline._upsample_token_ids(codes[1, 16:], 6, 6)
    wanted = pipeline(
        prompt="", prior_token_ids=twice, height=48, width=48, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    torch.testing.assert_close(drawn[1:], wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(codes[1:]), drawn[1:], rtol=0, atol=1e-5)  # whatever else is in the batch
    changed = codes.clone()
    changed[:, :16] = 0
    assert codec.decode(changed).equal(drawn)  # the preview is not drawn
    changed[:, 16] += 1
    assert not codec.decode(changed).equal(drawn)


def test_a_decoder_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = tiny("glm_image").model_copy(update={"decoder": str(tmp_path)})
    codec, codes = checkpoint_codec(options), torch.zeros(1, 52, dtype=torch.long)
    if DIFFUSERS:
        with pytest.raises(ValueError, match=r"policy\.decoder: .* is no readable GLM-Image pipeline"):
            codec.decode(codes)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="install the extra `diffusion`"):
        codec.decode(codes)
    cast(Any, codec).network.config["decoder"] = None
    with pytest.raises(ValueError, match="name the whole release"):
        codec.decode(codes)


def test_the_decoder_is_not_copied_along(tmp_path: Path) -> None:
    codec = checkpoint_codec(tiny("glm_image"))
    save_codec(codec, tmp_path)
    assert not any("pipeline" in name or "decoder" in name for name in codec.state_dict())
    assert codec_hash(load_codec(tmp_path)) == codec_hash(codec)


def test_a_null_prompt_and_a_size_are_settings() -> None:
    options = tiny("glm_image").model_copy(update={"null_prompt": "ugly", "image_size": (64, 32)})
    made = layout_of(options.path, options)
    assert len(made.null_prompt) == 4 and (made.grid.rows, made.grid.cols, made.grid.preview) == (8, 4, (5, 2))
    ids = torch.arange(made.grid.length).unsqueeze(0)
    assert read_codes(made, ids)[0].tolist() == list(range(10 + 32))
    with pytest.raises(ValueError, match="8x8 pixels"):
        layout_of(options.path, options.model_copy(update={"image_size": (50, 32)}))
