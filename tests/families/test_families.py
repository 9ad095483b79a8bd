"""Each family's real class: sampler against trainer, transformers' own guided sampling, and the pixels both ways."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import GenerationConfig, JanusForConditionalGeneration

from rlmm.codecs import codec_hash, load_codec, save_codec
from rlmm.config.policy import Lora
from rlmm.config.sampling import Sampling, Written
from rlmm.policies.families.loading import FAMILIES, checkpoint_codec, layout_of, load_policy
from rlmm.policies.layout_io import Supervised, read_codes, supervised_batch
from rlmm.policies.responses import response_of, texts_of
from rlmm.policies.still import Still
from rollouts.contract import Request
from rollouts.interleaved import generate_spans
from rollouts.law import Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import IMAGE, TEXT, Span
from tests.families.checkpoints import DIFFUSERS, SIZES, WRITERS, peaked, prompts, requests, sample, tiny

LAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance_scale": 3.0, "temperature": 0.9},
    "two scales, top-k": {"guidance_scale": 2.0, "source_scale": 1.5, "top_k": 50},
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", SIZES)
def test_sampler_log_probs_are_the_trainers_cached_or_not_and_through_a_wrapper(name: str, law: str) -> None:
    policy = peaked(name)
    rule = Law(policy.layout.image, **LAWS[law])
    cached, whole = sample(policy, rule), sample(policy, rule, use_cache=False)
    policy.model.train()  # as in a training step: Emu3's configuration asks for dropout, which no law here has
    with torch.no_grad():
        direct_BS, whole_BS = policy.log_probs(cached).logp_BS, policy.log_probs(whole).logp_BS
        wrapped_BS = policy.log_probs(cached, model=policy.model).logp_BS
    for made, logp_BS in ((cached, direct_BS), (whole, whole_BS)):
        assert float((logp_BS - made.sampler_logp)[made.target_mask].abs().max()) < 1e-4
    assert cached.ids[:, :4].equal(whole.ids[:, :4])  # later, rounding at the edge of a draw may part them
    torch.testing.assert_close(wrapped_BS, direct_BS, rtol=0, atol=1e-5)
    low, high = policy.layout.image
    decided = cached.ids[cached.target_mask]
    assert int(decided.min()) >= low and int(decided.max()) < high
    for position, token in policy.layout.grid.forced().items():
        assert (cached.ids[:, position] == token).all() and not cached.target_mask[:, position].any()


@pytest.mark.parametrize("name", WRITERS)
def test_a_thought_and_its_image_have_the_sampled_log_probs(name: str) -> None:
    policy = peaked(name)
    response = response_of(policy, Sampling(guidance_scale=2.0, thought=Written(length_limit=4, top_k=30)))
    streams = response.streams("a red circle", [])
    asked = Request("a", streams, tuple(range(4)), tuple(f"a/{i}" for i in range(4)))
    engine = TorchEngine(policy, num_layers=policy.sizes.num_hidden_layers)
    made = generate_spans(engine, policy.layout, [asked], response.spans)
    with torch.no_grad():
        found = policy.log_probs(made).logp_BS
    assert float((found - made.sampler_logp)[made.target_mask].abs().max()) < 1e-4
    text = made.ids[made.target_mask & (made.span == 0)]
    low, high = policy.layout.text
    assert int(text.min()) >= low and int(text.max()) < high and len(text.unique()) > 1
    assert read_codes(policy.layout, made.ids[:, -policy.layout.grid.length :]).min() >= 0
    assert len(texts_of(policy.tokenizer, made)) == 4


@pytest.mark.parametrize("name", SIZES)
def test_supervised_log_probs_are_those_of_a_sampled_image(name: str) -> None:
    policy = peaked(name)
    made = sample(policy, Law(policy.layout.image))
    codes = read_codes(policy.layout, made.ids).tolist()
    prompts = [policy.encode_prompt(row.rsplit("/", 1)[0]) for row in made.sample_id]
    source = [[*policy.layout.grid.forced().values()]] if policy.layout.takes_sources else []
    rows = [Supervised(prompt, image, source) for prompt, image in zip(prompts, codes, strict=True)]
    batch = supervised_batch(policy.layout, rows)
    with torch.no_grad():
        logp_BT = policy.sequence_log_probs(batch)
    for row, sampled_S in enumerate(made.sampler_logp):
        image = logp_BT[row][(batch.modality_BT[row] == 1) & batch.target_BT[row]]
        torch.testing.assert_close(image.double(), sampled_S[made.target_mask[row]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_of_the_text_a_prompt_alone_is_learned_and_only_where_a_head_decides_it(name: str) -> None:
    policy = load_policy(tiny(name).path, tiny(name))
    prompt = policy.encode_prompt(prompts(name)[0])
    batch = supervised_batch(policy.layout, [Supervised(prompt, [7] * len(policy.layout.grid.decided()))])
    learned = batch.ids_BT[batch.target_BT & (batch.modality_BT == TEXT)].tolist()
    assert learned == (prompt if policy.layout.decides_text else [])
    images = batch.ids_BT[batch.target_BT & (batch.modality_BT == IMAGE)]
    assert set(images.tolist()) == {policy.layout.image[0] + 7} and len(images) == len(policy.layout.grid.decided())


@pytest.mark.parametrize("name", SIZES)
def test_lora_trains_the_language_model_and_leaves_the_image_tokenizer_alone(name: str) -> None:
    policy = load_policy(tiny(name).path, tiny(name))
    policy.add_lora(Lora(rank=2, alpha=2), seed=0)
    trained = [n for n, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    assert not any(part in n for n in trained for part in ("vqmodel", "vision_model", "aligner"))
    synced = dict(policy.named_weights())
    assert not any("vqmodel" in n or "vision_model" in n for n in synced)
    made = sample(policy, Law(policy.layout.image, guidance_scale=2.0))
    policy.log_probs(made).logp_BS.sum().backward()
    gradients = [p.grad for n, p in policy.model.named_parameters() if "lora_B" in n]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.long
@pytest.mark.parametrize("name", SIZES)
def test_a_copy_that_stands_still_replays_what_it_was_taken_for(name: str) -> None:
    policy = peaked(name)
    policy.add_lora(Lora(rank=2, alpha=4), seed=0)
    drawn = sample(policy, Law(policy.layout.image))
    still = Still(policy)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.3
        old, new = (one.log_probs(drawn).logp_BS[drawn.target_mask] for one in (still.policy, policy))
        still.take()
        taken = still.policy.log_probs(drawn).logp_BS[drawn.target_mask]
    torch.testing.assert_close(old, drawn.sampler_logp[drawn.target_mask].to(old.dtype), rtol=0, atol=1e-4)
    assert (new - old).abs().max() > 1e-3 and torch.equal(taken, new)


@pytest.mark.parametrize("name", SIZES)
def test_pixels_become_codes_and_pixels_again_and_the_codec_is_kept(name: str, tmp_path: Path) -> None:
    codec = checkpoint_codec(tiny(name))
    images = torch.rand(3, 3, *SIZES[name], generator=torch.Generator().manual_seed(0))
    codes = codec.encode(images)
    layout = layout_of(tiny(name).path, tiny(name))
    assert codes.shape == (3, codec.tokens) == (3, len(layout.grid.decided())) and int(codes.max()) < codec.num_codes
    if name.startswith("glm_image") and not DIFFUSERS:
        pytest.skip("diffusers, which has the decoder, is not installed")
    hidden = torch.randn(3, 1 + codes.shape[1], 64) if codec.reads_hidden else None
    pixels = codec.decode(codes, hidden)
    assert pixels.shape == images.shape and pixels.isfinite().all()
    save_codec(codec, tmp_path)
    back = load_codec(tmp_path)
    assert codec_hash(back) == codec_hash(codec)
    assert back.encode(images).equal(codes) and back.decode(codes, hidden).equal(pixels)


def test_janus_draws_what_transformers_own_guided_sampling_draws() -> None:
    """Greedy there, nearly so here; the unconditional row is the prompt with padding in every place but the ends."""
    policy = peaked("janus")
    model = cast(JanusForConditionalGeneration, policy.base)
    layout, prompt = policy.layout, "a red circle"
    settings = GenerationConfig(
        max_length=200, do_sample=False, guidance_scale=5.0, bos_token_id=layout.bos, pad_token_id=layout.pad,
        generation_kwargs={"boi_token_id": layout.boi[0]},
    )  # fmt: skip
    ids = torch.tensor([layout.prefix(policy.encode_prompt(prompt))])
    theirs = model.generate(
        input_ids=cast(Any, ids),
        attention_mask=cast(Any, torch.ones_like(ids)),
        generation_mode="image",
        generation_config=settings,
    )
    streams = {
        "cond": layout.prefix(policy.encode_prompt(prompt)),
        "uncond": layout.prefix(layout.null(policy.encode_prompt(prompt))),
    }
    (request,) = requests(policy, [prompt], samples=1)
    law = Law(layout.image, guidance_scale=5.0, temperature=1e-4)
    engine = TorchEngine(policy, num_layers=2)
    bare = type(request)(request.group_id, streams, request.seeds, request.sample_ids)
    ours = engine.generate([bare], [Span("image", law, layout.grid.length)])
    assert read_codes(layout, ours.ids).tolist() == theirs.tolist()


@pytest.mark.parametrize("name", ["emu3", "simplear", "blip3o_next"])
def test_it_draws_what_transformers_own_guided_sampling_draws(name: str) -> None:
    policy = peaked(name)
    model, layout, prompt = policy.base, policy.layout, "a red circle"
    cond, uncond = layout.prefix(policy.encode_prompt(prompt)), layout.prefix(layout.null_prompt)
    forced, start = layout.grid.forced(), len(cond)

    def allowed(_: int, ids_T: torch.Tensor) -> list[int]:
        position = len(ids_T) - start
        return [forced[position]] if position in forced else list(range(*layout.image))

    ids, null = torch.tensor([cond]), torch.tensor([uncond])
    theirs = cast(Any, model).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), negative_prompt_ids=null,
        negative_prompt_attention_mask=torch.ones_like(null), guidance_scale=3.0, do_sample=False,
        max_new_tokens=layout.grid.length, min_new_tokens=layout.grid.length, prefix_allowed_tokens_fn=allowed,
        eos_token_id=None,
    )  # fmt: skip
    (request,) = requests(policy, [prompt], samples=1)
    bare = type(request)(request.group_id, {"cond": cond, "uncond": uncond}, request.seeds, request.sample_ids)
    law = Law(layout.image, guidance_scale=3.0, temperature=1e-4)
    ours = TorchEngine(policy, num_layers=2).generate([bare], [Span("image", law, layout.grid.length)])
    assert ours.ids.tolist() == theirs[:, start:].tolist()


@pytest.mark.parametrize("name", SIZES)
def test_a_family_says_whether_its_images_are_drawn_from_hidden_states(name: str) -> None:
    if name.startswith("glm_image") and not DIFFUSERS:
        pytest.skip("diffusers, which has the decoder, is not installed")
    assert FAMILIES[name].reads_hidden == checkpoint_codec(tiny(name)).reads_hidden


def test_a_family_that_says_otherwise_than_its_codec_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "janus", replace(FAMILIES["janus"], reads_hidden=True))
    with pytest.raises(ValueError, match="has reads_hidden False and the family says True.*set Family.reads_hidden"):
        checkpoint_codec(tiny("janus"))
