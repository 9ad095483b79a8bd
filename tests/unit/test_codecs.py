"""Codecs: exact bijections, gradients, files, and that training one works."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from rlmm.codecs import (
    PatchCodec,
    build_codec,
    codec_hash,
    codec_loss,
    images_to_tensor,
    load_codec,
    reconstruction_metrics,
    save_codec,
    tensor_to_images,
)
from rlmm.codecs.base import CodecOutput
from rlmm.codecs.loss import code_use, edge_loss, psnr_db
from rlmm.codecs.quantizers import Fsq, Lfq, Vq
from rlmm.config.codec import CodecConfig, FsqCodec, LfqCodec, VqCodec
from rlmm.config.stages import CodecStage
from rlmm.train.codec import ImageBatch, loss_function
from rlmm.train.metrics import Meter

SIZE = {"image_size": (16, 24), "channels": 1, "patch": 8, "width": 16, "blocks": 1}
CONFIGS = {
    "fsq": FsqCodec.model_validate({**SIZE, "levels": (4, 5, 3)}),
    "vq": VqCodec.model_validate({**SIZE, "codebook_size": 32}),
    "lfq": LfqCodec.model_validate({**SIZE, "bits": 5}),
    "fsq, context decoder": FsqCodec.model_validate({**SIZE, "levels": (4, 5, 3), "context": "decoder"}),
    "fsq, context none": FsqCodec.model_validate({**SIZE, "levels": (4, 5, 3), "context": "none"}),
}


def codec(kind: str, seed: int = 0) -> PatchCodec:
    torch.manual_seed(seed)
    return build_codec(CONFIGS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
def test_many_images_are_made_a_few_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, images = codec(kind), pictures(7)
    with torch.no_grad():
        codes, latents = made.codes(images)
        whole = made.draw(codes)
        monkeypatch.setattr("rlmm.codecs.base.PIXELS_AT_ONCE", 3 * 16 * 24 + 5)
        encode, draw, sizes = made._encoded, made._drawn, list[int]()
        monkeypatch.setattr(made, "_encoded", lambda part: sizes.append(len(part)) or encode(part))
        monkeypatch.setattr(made, "_drawn", lambda part, hidden: sizes.append(len(part)) or draw(part, hidden))
        assert made.encode(images).equal(codes)
        torch.testing.assert_close(made.decode(codes), whole)
        assert sizes == [3, 3, 1, 3, 3, 1]
        monkeypatch.setattr("rlmm.codecs.base.PIXELS_AT_ONCE", 5)
        assert made.at_once == 1


def pictures(count: int = 6) -> torch.Tensor:
    """Dark rectangles on white."""
    images = torch.ones(count, 1, 16, 24)
    for i in range(count):
        images[i, :, 2 + i % 5 : 10, 3 * (i % 4) : 12 + i % 7] = 0.1
    return images


def test_fsq_outermost_levels_are_reached_and_never_passed() -> None:
    for levels in [(2,), (3,), (8,), (999,), (1000,)]:
        quantizer = Fsq(FsqCodec.model_validate({**SIZE, "levels": levels}))
        assert quantizer(torch.tensor([[[-60.0], [60.0]]]))[1].tolist() == [[0, levels[0] - 1]]


@pytest.mark.parametrize("levels", [(2,), (3, 2), (8, 6, 5), (7, 5, 5, 5)])
def test_fsq_codes_and_latents_are_a_bijection(levels: tuple[int, ...]) -> None:
    quantizer = Fsq(FsqCodec.model_validate({**SIZE, "levels": levels}))
    ids = torch.arange(CONFIGS["fsq"].model_copy(update={"levels": levels}).num_codes).unsqueeze(0)
    latents = quantizer.codes(ids)
    assert len({tuple(row) for row in latents[0].tolist()}) == ids.shape[1]
    assert latents.abs().max() <= 1
    # The pre-image of each level under the bound, found by inverting it, must quantize back to its code.
    half_width = (torch.tensor(levels) - 1) * (1 + 1e-3) / 2
    offset = torch.where(torch.tensor(levels) % 2 == 0, 0.5, 0.0)
    wanted = latents * (torch.tensor(levels) // 2)
    ratio = ((wanted + offset) / half_width).clamp(-1 + 1e-6, 1 - 1e-6)
    _, back, _ = quantizer(torch.atanh(ratio) - torch.atanh(offset / half_width))
    assert torch.equal(back, ids)


def test_lfq_codes_are_the_signs() -> None:
    quantizer = Lfq(CONFIGS["lfq"])
    ids = torch.arange(32).unsqueeze(0)
    assert torch.equal(quantizer(quantizer.codes(ids))[1], ids)
    assert quantizer.codes(torch.tensor([[5]])).tolist() == [[[1, -1, 1, -1, -1]]]


def test_lfq_penalty_is_the_entropy_gap_and_finite_for_sure_bits() -> None:
    """Against the whole codebook's posteriors for one bit; and no NaN where every bit is certain."""
    quantizer = Lfq(LfqCodec.model_validate({**SIZE, "bits": 1, "commitment": 0, "entropy_weight": 1}))
    latents = torch.tensor([[[0.3], [-0.2], [0.05]]])
    posterior = torch.softmax(-(latents.flatten()[:, None] - torch.tensor([-1.0, 1.0])).square(), -1)
    mean = posterior.mean(0)
    wanted = -(posterior * posterior.log()).sum(-1).mean() + (mean * mean.log()).sum()
    torch.testing.assert_close(quantizer(latents)[2], wanted)
    sure = torch.full((2, 3, 1), 500.0, requires_grad=True)
    quantizer(sure)[2].backward()
    assert sure.grad is not None and sure.grad.isfinite().all()


def test_vq_brings_idle_codes_to_the_data() -> None:
    """Latents near one point: at first few codes are near, later most are."""
    torch.manual_seed(0)
    quantizer = Vq(CONFIGS["vq"])
    centre = torch.nn.functional.normalize(torch.randn(8), dim=0)
    latents = (centre + 0.05 * torch.randn(200, 8)).unsqueeze(0)
    used = lambda: len(quantizer(latents)[1].unique())  # noqa: E731
    before = used()
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        quantizer(latents)[2].backward()
        optimizer.step()
    assert before <= 4 and used() >= 16


def test_vq_picks_the_nearest_code_and_pulls_both_ways() -> None:
    torch.manual_seed(0)
    quantizer = Vq(CONFIGS["vq"])
    latents = torch.randn(2, 3, 8, requires_grad=True)
    quantized, ids, loss = quantizer(latents)
    unit = torch.nn.functional.normalize(latents.detach(), dim=-1)
    distance = torch.cdist(unit.flatten(0, 1), torch.nn.functional.normalize(quantizer.codebook_CD.detach(), dim=-1))
    assert torch.equal(distance.argmin(-1), ids.flatten())
    assert torch.allclose(quantized, quantizer.codes(ids))
    loss.backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    assert quantizer.codebook_CD.grad is not None and (quantizer.codebook_CD.grad.abs().sum(-1) > 0).all()


def test_straight_through_gradient_is_the_bounds_own() -> None:
    # Odd L: d/dz tanh(z) h / (L // 2), rounding ignored, with h = 1.001 (L - 1) / 2. By hand for L = 5 and L = 3.
    quantizer = Fsq(FsqCodec.model_validate({**SIZE, "levels": (5, 3)}))
    latents = torch.tensor([[[0.0, 0.7], [-1.3, 2.0]]], requires_grad=True)
    weight = torch.tensor([[[1.0, -2.0], [0.5, 3.0]]])
    (quantizer(latents)[0] * weight).sum().backward()
    by_hand = weight * 1.001 / latents.detach().cosh().square()
    torch.testing.assert_close(latents.grad, by_hand)


@pytest.mark.parametrize(
    ("kind", "alone"), [("fsq", False), ("fsq, context decoder", True), ("fsq, context none", True)]
)
def test_an_encoder_without_context_gives_a_patch_a_code_of_its_own(kind: str, alone: bool) -> None:
    model = codec(kind).eval()
    plain = torch.rand(1, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    changed = plain.clone()
    changed[..., 8:, 8:16] = 1 - plain[..., 8:, 8:16]  # token 4 of the 2x3 grid
    with torch.no_grad():
        before, after = (model._latents(images)[0] for images in (plain, changed))
    moved = set((before != after).any(-1).nonzero().flatten().tolist())
    assert moved == ({4} if alone else set(range(6)))


@pytest.mark.parametrize(("kind", "alone"), [("fsq, context decoder", False), ("fsq, context none", True)])
def test_a_decoder_without_context_gives_a_code_pixels_of_its_own(kind: str, alone: bool) -> None:
    model, ids = codec(kind).eval(), torch.arange(6)[None]
    with torch.no_grad():
        moved = (model.decode(ids) != model.decode(ids.where(ids != 4, 50)))[0, 0]
    assert moved[8:, 8:16].any() and alone != bool(moved[:8].any() or moved[8:, :8].any() or moved[8:, 16:].any())


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_image_does_not_depend_on_its_batch(kind: str) -> None:
    model, images = codec(kind).eval(), pictures()
    with torch.no_grad():
        ids = model.encode(images)
        assert ids.shape == (6, 6) and ids.dtype == torch.int64 and int(ids.max()) < model.num_codes
        assert torch.equal(model.encode(images[2:3]), ids[2:3])
        torch.testing.assert_close(model.decode(ids)[2:3], model.decode(ids[2:3]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_brings_the_picture_back(kind: str) -> None:
    model, images = codec(kind), pictures(12)
    before = reconstruction_metrics(model.eval(), images)["psnr_db"]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss, figures = codec_loss(model, images)
        loss.backward()
        optimizer.step()
    after = reconstruction_metrics(model.eval(), images)
    assert after["psnr_db"] > before + 5 and figures.keys() == {"psnr_db", "codebook_use", "codebook_perplexity"}
    assert 0 < after["codebook_use"] <= 1 and after["codebook_perplexity"] > 2


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_codec_comes_back_bit_equal(kind: str, tmp_path: Path) -> None:
    model = codec(kind).eval()
    save_codec(model, tmp_path)
    back = load_codec(tmp_path)
    assert codec_hash(back) == codec_hash(model) != codec_hash(codec(kind, seed=1))
    assert back.settings == model.settings
    with torch.no_grad():
        assert torch.equal(back.decode(back.encode(pictures())), model.decode(model.encode(pictures())))


def test_unreadable_codecs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"codec\.safetensors, codec\.json missing"):
        load_codec(tmp_path)
    save_codec(codec("fsq"), tmp_path)
    weights = (tmp_path / "codec.safetensors").read_bytes()
    (tmp_path / "codec.safetensors").write_bytes(weights[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        load_codec(tmp_path)
    (tmp_path / "codec.safetensors").write_bytes(weights)
    (tmp_path / "codec.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_codec(tmp_path)
    (tmp_path / "codec.json").write_text(CONFIGS["fsq"].model_copy(update={"width": 24}).model_dump_json())
    with pytest.raises(ValueError, match="does not fit"):
        load_codec(tmp_path)


def test_wrong_sizes_and_codes_are_refused() -> None:
    model = codec("fsq")
    with pytest.raises(ValueError, match="takes"):
        model.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="grid is 2x3"):
        model.decode(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"outside \[0, 60\)"):
        model.decode(torch.full((1, 6), 60))
    with pytest.raises(ValueError, match="image 1 is 9x9"):
        images_to_tensor([Image.new("L", (24, 16)), Image.new("L", (9, 9))], model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_nan_gets_no_code(kind: str) -> None:
    model = codec(kind)
    with pytest.raises(ValueError, match="in the images"):
        model.encode(torch.full((1, 1, 16, 24), torch.nan))
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="training diverged"):
        model.encode(pictures(1))


def test_images_survive_the_way_to_tensors_and_back() -> None:
    image = Image.effect_noise((24, 16), 60)
    (back,) = tensor_to_images(images_to_tensor([image], codec("fsq")))
    assert back.tobytes() == image.tobytes() and back.mode == "L"


def test_figures_against_closed_forms() -> None:
    a = torch.zeros(1, 1, 8, 8)
    assert psnr_db(a + 0.1, a) == pytest.approx(20.0, abs=1e-4)
    assert code_use(torch.tensor([[0, 0, 1, 1]]), 4) == {"codebook_use": 0.5, "codebook_perplexity": pytest.approx(2.0)}
    assert edge_loss(a, a + 0.5) == 0  # edges alone: a shift of grey is none
    step = a.clone()
    step[..., 4:] = 1
    assert edge_loss(a, step) > 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patch": 7}, "7-pixel patches"),
        ({"levels": (1, 4)}, "2 levels"),
        ({"levels": (1001,)}, "at most 1000"),
        ({"width": 20}, "multiple of 8"),
    ],
)
def test_impossible_codecs_are_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        TypeAdapter(CodecConfig).validate_python({"kind": "fsq", **SIZE, "levels": (4, 4), **change})


class CastsNothing(torch.nn.Module):
    """As a DeepSpeed engine does on a GPU: its own forward is under no autocast, whatever is around it."""

    def __init__(self, module: PatchCodec) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor) -> CodecOutput:
        with torch.autocast("cpu", enabled=False):
            return self.module(images)


def test_a_wrapped_codec_computes_in_bfloat16_where_that_is_asked_for() -> None:
    def loss(model: torch.nn.Module, precision: str) -> float:
        config = CodecStage.model_validate({"steps": 1, "learning_rate": 1e-3, "precision": precision})
        return float(loss_function(config)(model, ImageBatch(pictures(), 1.0), Meter()).detach())

    own = codec("fsq")
    assert loss(CastsNothing(own), "bfloat16") == loss(own, "bfloat16") != loss(own, "float32")
    assert loss(CastsNothing(own), "float32") == loss(own, "float32")
