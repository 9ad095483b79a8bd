"""Each masked family's class: attention, sampler against trainer, the supervised loss, and the pixels both ways."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PhiForCausalLM

from rlmm.codecs import codec_hash, load_codec, save_codec
from rlmm.config.policy import Lora
from rlmm.policies.families.loading import checkpoint_codec, load_policy
from rlmm.policies.layout_io import Supervised, read_codes, supervised_batch
from rlmm.policies.masked import States
from rlmm.policies.models import MMadaConfig, MMadaModelLM, Showo
from rlmm.policies.spelling import NO_SOURCES
from rollouts.law import Law
from rollouts.trajectory import TEXT
from rollouts.unmasking import Unmasking
from tests.families.masked_checkpoints import MASKED, SIZE, peaked, sample, tiny

LAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance_scale": 3.0, "temperature": 0.9},
    "guided, top-k": {"guidance_scale": 2.0, "top_k": 50},
}
AS_LLAMA = {
    "transformer.wte": "embed_tokens", "transformer.ln_f": "norm", "model.transformer.ff_out": "lm_head",
    "transformer.blocks": "layers", "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
    ".q_proj": ".self_attn.q_proj", ".k_proj": ".self_attn.k_proj", ".v_proj": ".self_attn.v_proj",
    ".attn_out": ".self_attn.o_proj", ".ff_proj": ".mlp.gate_proj", ".up_proj": ".mlp.up_proj",
    ".ff_out": ".mlp.down_proj",
}  # fmt: skip


def as_llama(name: str) -> str:
    for published, ours in AS_LLAMA.items():
        name = name.replace(published, ours)
    return name


def test_llada_is_transformers_llama_without_the_causal_mask() -> None:
    config = MMadaConfig(
        vocab_size=126400, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=48, rope_theta=77.0
    )
    torch.manual_seed(0)
    model = MMadaModelLM(config).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    like = LlamaConfig(
        vocab_size=126400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 77.0},
        tie_word_embeddings=False,
    )  # fmt: skip
    like.is_causal = False
    llama = LlamaForCausalLM(like).double()
    llama.load_state_dict({as_llama(name): weight for name, weight in model.state_dict().items()})
    ids = torch.randint(0, 126400, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        found = model(ids, mask, positions).logits
        wanted = llama(ids, attention_mask=mask, position_ids=positions).logits
        shifted, cut = model(ids, mask).logits, model(ids[:1, :4], mask[:1, :4]).logits
    torch.testing.assert_close(found[mask], wanted[mask], rtol=0, atol=1e-4)  # their angles are in float32
    torch.testing.assert_close(shifted[mask], found[mask], rtol=0, atol=1e-5)  # only distances count
    assert float((found[0, 3] - cut[0, 3]).abs().max()) > 1e-2  # what comes later is seen


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_show_o_is_transformers_phi_under_the_published_mask(implementation: str) -> None:
    """Two sequences with text after the image, one left-padded, one right-padded, and the mask place by place."""
    policy = peaked("show_o")
    model = cast(Showo, policy.base)
    model.set_attn_implementation(implementation)
    text, image = [50300, 50256, 40, 41, 42, 50256], [50296, 50310, 58497, 50320, 50297]
    pads, after = [50295] * 3, [43, 44]
    ids = torch.tensor([[*pads, *text, *image, *after], [*text, *image, *after, *pads]])
    seen = ids != 50295
    places = range(ids.shape[1])
    allowed = torch.zeros(2, len(places), len(places), dtype=torch.bool)
    for row, start in ((0, 9), (1, 6)):
        for query in places:
            for key in places:
                whole = start <= query < start + len(image)
                allowed[row, query, key] = bool(seen[row, key]) and (whole or key <= query)
    phi = PhiForCausalLM(model.config)
    phi.load_state_dict(model.showo.state_dict())
    positions = (seen.long().cumsum(-1) - 1).clamp_min(0)
    bias = torch.zeros(allowed[:, None].shape).masked_fill(~allowed[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        found = model(ids, seen, positions).logits
        wanted = phi.eval()(input_ids=ids, attention_mask=bias, position_ids=positions).logits
        causal = phi(input_ids=ids, attention_mask=seen, position_ids=positions).logits
    torch.testing.assert_close(found[seen], wanted[seen], rtol=0, atol=1e-4)
    assert float((found - causal)[seen].abs().max()) > 1e-2


@pytest.mark.parametrize("order", ["random", "ancestral", "confidence"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", MASKED)
def test_sampler_log_probs_are_the_trainers_directly_and_through_a_wrapper(name: str, law: str, order: Any) -> None:
    if order == "confidence" and "top_k" in LAWS[law]:
        pytest.skip("has no known log-prob, and is refused")
    policy = peaked(name)
    made = sample(policy, Law(policy.layout.image, **LAWS[law]), Unmasking(4, order, "cosine"))
    policy.model.train()
    with torch.no_grad():
        direct_BS = policy.log_probs(made).logp_BS
        wrapped_BS = policy.log_probs(made, model=policy.model).logp_BS
    assert float((direct_BS - made.sampler_logp)[made.target_mask].abs().max()) < 1e-4
    torch.testing.assert_close(wrapped_BS, direct_BS, rtol=0, atol=1e-5)
    assert float(made.sampler_logp[made.target_mask].std()) > 0.1
    low, high = policy.layout.image
    decided = made.ids[made.target_mask]
    assert int(decided.min()) >= low and int(decided.max()) < high
    for position, token in policy.layout.grid.forced().items():
        assert (made.ids[:, position] == token).all() and not made.target_mask[:, position].any()


@pytest.mark.parametrize("name", MASKED)
def test_supervised_log_probs_are_those_of_the_sampled_states(name: str) -> None:
    """Right-padded with the target's mask there, left-padded prefixes and states here."""
    policy = peaked(name)
    made = sample(policy, Law(policy.layout.image), Unmasking(3))
    codes = read_codes(policy.layout, made.ids).tolist()
    prompts = [policy.encode_prompt(row.rsplit("/", 1)[0]) for row in made.sample_id]
    rows = [Supervised(prompt, image) for prompt, image in zip(prompts, codes, strict=True)]
    batch = supervised_batch(policy.layout, rows)
    hidden_BS = made.target_mask & (torch.arange(made.ids.shape[1]) % 3 != 0)
    noised_BT = torch.zeros_like(batch.mask_BT)
    for row, prompt in enumerate(prompts):
        start = len(policy.layout.prefix(prompt))
        noised_BT[row, start : start + made.ids.shape[1]] = hidden_BS[row]
    with torch.no_grad():
        logp_BT = policy.sequence_log_probs(replace(batch, noised_BT=noised_BT))
        wanted_BS, _ = policy.read(made, States(torch.arange(len(made)), hidden_BS, hidden_BS))
    torch.testing.assert_close(logp_BT[noised_BT], wanted_BS[hidden_BS], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MASKED)
def test_what_a_position_sees(name: str) -> None:
    """An image position sees the prompt and every image position, and so does the prompt, but for Show-o's, which sees
    what comes before. Padding is seen by none."""
    policy = peaked(name)
    low = policy.layout.image[0]
    prefix = policy.layout.prefix(policy.encode_prompt("a circle"))
    ids = torch.tensor([[*prefix, *[policy.mask] * policy.layout.grid.length]])
    start, last = len(prefix), ids.shape[1] - 1

    def read(ids_1T: torch.Tensor, pads: int = 0) -> torch.Tensor:
        grown = torch.nn.functional.pad(ids_1T, (pads, 0), value=policy.layout.pad)
        seen = torch.ones_like(grown, dtype=torch.bool)
        seen[:, :pads] = False
        with torch.no_grad():
            return policy.hidden(grown, seen)[0, pads:]

    plain = read(ids)
    torch.testing.assert_close(read(ids, pads=5), plain, rtol=0, atol=1e-4)
    for place, token in ((1 + len(prefix) // 2, 40), (last - 2, low + 5)):
        changed = ids.clone()
        changed[0, place] = token
        moved = (read(changed) - plain).abs().amax(-1) > 1e-4
        assert moved[start:].all()
        seen_by_text = name != "show_o" or place < start
        assert moved[: start - 1].all() if name != "show_o" else not moved[: min(place, start - 1)].any()
        assert moved[start - 1] and seen_by_text == bool(moved[start - 2])


@pytest.mark.parametrize("name", MASKED)
def test_lora_trains_the_projections_of_every_layer_and_no_head(name: str) -> None:
    policy = load_policy(tiny(name).path, tiny(name))
    policy.add_lora(Lora(rank=2, alpha=2), seed=0)
    trained = {n.split(".lora_")[0] for n, p in policy.model.named_parameters() if p.requires_grad}
    blocks = [n for n in trained if ".0." in n]
    assert len(trained) == 2 * len(blocks) and len(blocks) >= 6
    made = sample(policy, Law(policy.layout.image, guidance_scale=2.0), Unmasking(3))  # pyrefly: ignore
    policy.log_probs(made).logp_BS.sum().backward()
    gradients = [p.grad for n, p in policy.model.named_parameters() if "lora_B" in n]
    assert all(gradient is not None and 0 < gradient.abs().sum() < torch.inf for gradient in gradients)


@pytest.mark.parametrize("name", MASKED)
def test_pixels_become_codes_and_pixels_again_and_the_codec_is_kept(name: str, tmp_path: Path) -> None:
    codec = checkpoint_codec(tiny(name))
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    codes = codec.encode(images)
    assert codes.shape == (3, 3 * 4) and int(codes.max()) < codec.num_codes and len(codes.unique()) > 6
    pixels = codec.decode(codes)
    assert pixels.shape == images.shape and pixels.isfinite().all()
    save_codec(codec, tmp_path)
    back = load_codec(tmp_path)
    assert codec_hash(back) == codec_hash(codec)
    assert back.encode(images).equal(codes) and back.decode(codes).equal(pixels)


def test_show_os_text_is_never_masked() -> None:
    policy = load_policy(tiny("show_o").path, tiny("show_o"))
    batch = supervised_batch(policy.layout, [Supervised(policy.encode_prompt("a circle"), range(12))])
    assert not (batch.target_BT & (batch.modality_BT == TEXT)).any()
    with pytest.raises(ValueError, match="text is causal.*text_weight: 0"):
        policy.sequence_log_probs(replace(batch, noised_BT=batch.mask_BT))


@pytest.mark.parametrize("name", MASKED)
def test_source_images_have_no_place(name: str) -> None:
    policy = load_policy(tiny(name).path, tiny(name))
    assert policy.spelling.fault("a circle", 0) is None
    fault = policy.spelling.fault("a circle", 1)
    assert fault is not None and fault.reason == NO_SOURCES
