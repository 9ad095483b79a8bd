"""Janus answers about what its own vision encoder sees, as transformers' class does."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import JanusForConditionalGeneration, JanusImageProcessorPil

from rlmm.config.recipe import validate_recipe
from rlmm.config.sampling import Sampling, Written
from rlmm.config.stages import GrpoStage
from rlmm.data import Example
from rlmm.pipeline import run_recipe
from rlmm.policies.families.loading import checkpoint_codec, load_policy
from rlmm.policies.layout_io import supervised_batch
from rlmm.policies.pictures import Features, Pictures
from rlmm.policies.responses import response_of, writing_spelling
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.supervised import encode_rows
from rlmm.train.tokens import ImageTokens
from rollouts.contract import SEEN, Request
from rollouts.interleaved import generate_spans
from rollouts.store import read_trajectory, write_trajectory
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Trajectory
from tests.families.checkpoints import peaked, tiny
from tests.families.test_answers import picture

QUESTION = "what is shown"
PLACEHOLDER = 100594


@pytest.fixture(scope="module")
def janus() -> TransformerPolicy:
    policy = peaked("janus")
    with torch.no_grad():  # so that what is seen matters beside the words
        for parameter in policy.base.get_submodule("model.aligner").parameters():
            parameter.mul_(10)
    return policy


def spelled(policy: TransformerPolicy, *seeds: int) -> list[list[int]]:
    assert policy.pictures is not None
    return policy.pictures.spell([picture(seed) for seed in seeds])


def answers(policy: TransformerPolicy, sampling: Sampling, *seeds: int, count: int = 1) -> Trajectory:
    response = response_of(policy, sampling)
    streams = response.streams(QUESTION, spelled(policy, *seeds))
    asked = Request("a", streams, tuple(range(count)), tuple(f"a/{i}" for i in range(count)))
    engine = TorchEngine(policy, num_layers=policy.sizes.num_hidden_layers)
    return generate_spans(engine, policy.layout, [asked], response.spans)


def theirs(policy: TransformerPolicy, made: Trajectory, *seeds: int) -> dict[str, Any]:
    """What transformers' class takes: the prompt with its placeholder, and pixels."""
    prompt = made.streams["cond"].ids_BP[:1]
    processor: Any = JanusImageProcessorPil.from_pretrained(tiny("janus").path)
    pixels = processor([picture(seed) for seed in seeds], return_tensors="pt").pixel_values
    ids = torch.where(prompt >= SEEN, PLACEHOLDER, prompt)
    assert int((ids == PLACEHOLDER).sum()) == 9 * len(seeds)
    return {"input_ids": ids, "pixel_values": pixels}


@pytest.mark.parametrize("seeds", [(0,), (1, 2)])
def test_greedy_answers_are_those_of_transformers_own_generate(
    janus: TransformerPolicy, seeds: tuple[int, ...]
) -> None:
    made = answers(janus, Sampling(answer=Written(length_limit=12, temperature=1e-4)), *seeds)
    model: Any = janus.base
    found = model.generate(
        **theirs(janus, made, *seeds), generation_mode="text", do_sample=False, max_new_tokens=12, eos_token_id=100001
    )
    length = int(made.attention_mask.sum())
    assert made.ids[0, :length].tolist() == found[0, -length:].tolist() and length > 2
    assert len(set(made.ids[0, :length].tolist())) > 2


@pytest.mark.parametrize("seeds", [(3,), (1, 2)])
def test_log_probs_are_those_of_transformers_own_forward(janus: TransformerPolicy, seeds: tuple[int, ...]) -> None:
    made = answers(janus, Sampling(answer=Written(length_limit=6, stop=("<begin_of_image>",))), *seeds)
    inputs, model = theirs(janus, made, *seeds), janus.base
    assert isinstance(model, JanusForConditionalGeneration)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], made.ids], 1)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -made.ids.shape[1] - 1 : -1]
        found = janus.log_probs(made).logp_BS
    wanted = logits.double().log_softmax(-1).gather(-1, made.ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.sampler_logp, wanted, atol=1e-5, rtol=0)


def test_a_stored_answer_is_read_by_a_policy_that_never_saw_the_picture(
    janus: TransformerPolicy, tmp_path: Path
) -> None:
    assert janus.pictures is not None
    janus.pictures.folder = tmp_path / "seen"
    made = answers(janus, Sampling(answer=Written(length_limit=5)), 4, count=2)
    janus.pictures.folder = None
    write_trajectory(tmp_path / "a.parquet", made, {})
    read, _ = read_trajectory(tmp_path / "a.parquet")
    other = peaked("janus")
    other.base.load_state_dict(janus.base.state_dict())
    with pytest.raises(ValueError, match="pixels cannot be read"), torch.no_grad():
        other.log_probs(read)
    assert other.pictures is not None
    other.pictures.folder = tmp_path / "seen"
    with torch.no_grad():
        torch.testing.assert_close(other.log_probs(read).logp_BS.double(), made.sampler_logp, atol=1e-5, rtol=0)
    stored = next((tmp_path / "seen").iterdir())
    stored.write_bytes(b"torn")
    torn = Pictures(9)
    torn.folder = tmp_path / "seen"
    with pytest.raises(ValueError, match="pixels cannot be read"):
        torn.pixels(int(stored.stem, 16))


def test_a_question_is_spelled_as_published_and_a_template_of_ones_own_after_the_image(
    janus: TransformerPolicy,
) -> None:
    (image,) = spelled(janus, 5)

    def said(written: Written) -> str:
        ids = response_of(janus, Sampling(answer=written)).streams(QUESTION, [image])["cond"]
        return str(janus.tokenizer.decode([PLACEHOLDER if token >= SEEN else token for token in ids])).replace(" ", "")

    seen = "<begin_of_image>" + 9 * "<image_placeholder>" + "<end_of_image>"
    published = said(Written(length_limit=3))
    assert published.endswith(f"naturallanguage.\n\n<|User|>:{seen}\nwhatisshown\n\n<|Assistant|>:")
    assert "Youareahelpful" in published
    own = said(Written(length_limit=3, template="Q: {prompt} A:"))
    assert own.endswith(f"{seen}Q:whatisshownA:") and "helpful" not in own
    drawn = response_of(janus, Sampling()).streams("a", [[*range(102400, 102409)]])["cond"]
    assert max(drawn) < SEEN and "helpful" not in str(janus.tokenizer.decode(list(drawn[:8])))


def test_answers_are_learnt_from_what_is_seen(janus: TransformerPolicy) -> None:
    assert janus.pictures is not None
    tokens = ImageTokens(checkpoint_codec(tiny("janus")), pictures=janus.pictures)
    stage = GrpoStage(steps=1, learning_rate=1e-3, sampling=Sampling(answer=Written(length_limit=3)))
    written = stage.sampling.written
    assert written is not None
    asked = [Example(QUESTION, sources=(picture(seed),), texts=("a ship",)) for seed in (6, 7)]
    rows, left_out = encode_rows(tokens, janus.spelling, written, cast(Any, asked))
    assert not left_out
    batch = supervised_batch(janus.layout, rows)
    said = writing_spelling(janus.spelling, Written(length_limit=1, template="{prompt}"), 0, True).encode("a ship")
    target = batch.ids_BT[batch.target_BT]
    assert target.tolist() == [*said, 100001] * 2 and int((batch.ids_BT >= SEEN).sum()) == 18
    logp_BT = janus.sequence_log_probs(batch)
    first, second = logp_BT[batch.target_BT].chunk(2)
    assert float((first - second).detach().abs().max()) > 1e-3  # of the same words, about two pictures
    logp_BT.sum().backward()
    assert all(p.grad is None for n, p in janus.base.named_parameters() if n.startswith(janus.frozen_parts))
    assert janus.base.get_submodule("model.language_model.embed_tokens").get_parameter("weight").grad is not None
    janus.model.zero_grad()


def test_features_are_made_once_and_the_oldest_forgotten() -> None:
    asked: list[list[int]] = []

    def encode(numbers: list[int]) -> torch.Tensor:
        asked.append(numbers)
        return torch.tensor(numbers).float()[:, None, None].expand(-1, 2, 3)

    features = Features(most=2)
    assert [int(one[0, 0]) for one in features.of([3, 5, 7], encode)] == [3, 5, 7]
    features.of([5, 7], encode)
    features.of([3], encode)
    assert asked == [[3, 5, 7], [3]]


def test_with_weights_in_parts_every_update_looks_once_whatever_its_rows_show(
    janus: TransformerPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,) = spelled(janus, 9)
    shown = torch.tensor([[100000, *image, 5, 6]])
    blind = torch.full_like(shown, 7)
    whole = torch.ones_like(shown, dtype=torch.bool)
    looked: list[int] = []
    look = janus.base.model.get_image_features  # pyrefly: ignore

    def watched(pixels: torch.Tensor) -> Any:
        looked.append(len(pixels))
        return look(pixels)

    monkeypatch.setattr(janus.base.model, "get_image_features", watched)
    with torch.no_grad():
        wanted = [janus.hidden(ids, whole, model=janus.model) for ids in (shown, blind)]
        assert looked == [1]
        monkeypatch.setattr(type(janus), "in_parts", True)
        found = [janus.hidden(ids, whole, model=janus.model) for ids in (shown, blind, shown)]
        assert looked == [1, 1, 1, 1]
        janus.hidden(shown, whole)  # where all of the policy is whole, nothing is looked at again
    assert looked == [1, 1, 1, 1]
    for one, other in zip(found, [*wanted, wanted[0]], strict=True):
        torch.testing.assert_close(one, other)


def test_what_does_not_say_how_pixels_are_normed_draws_and_is_asked_about_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "janus"
    shutil.copytree(tiny("janus").path, folder)
    (folder / "preprocessor_config.json").unlink()
    options = tiny("janus").model_copy(update={"path": str(folder)})
    policy = load_policy(folder, options)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        answers(policy, Sampling(answer=Written(length_limit=3)), 8)


@pytest.mark.slow
def test_a_run_answers_about_what_is_seen_and_its_understanding_is_measured(tmp_path: Path) -> None:
    questions = {"kind": "scenes", "variant": "describe", "train_images": 4, "held_out": 4, "prompts": 4,
                 "colors": ["red", "blue"], "shapes": ["circle", "square"]}  # fmt: skip
    exact = {"terms": [{"name": "exact_match"}]}
    step = {"steps": 2, "learning_rate": 1e-3, "micro_batch_size": 2, "warmup_steps": 0}
    answer = {"length_limit": 4, "top_k": 20}
    made = validate_recipe(
        {
            "name": "seen", "run_dir": str(tmp_path / "run"), "data": questions,
            "policy": tiny("janus").model_dump(), "rewards": exact,
            "held_out": {"terms": [{"function": "tests/recipes/rewards.py:left_darkness", "label": "dark"}]},
            "understanding": {"data": questions, "answer": answer, "rewards": exact, "prompts": 2},
            "stages": {
                "sft": {"kind": "sft", **step, "batch_size": 2, "text_weight": 1.0, "understanding_share": 0.5},
                "grpo": {"kind": "grpo", **step, "prompts_per_step": 2, "samples_per_prompt": 2,
                         "lora": {"rank": 2, "alpha": 2}, "sampling": {"answer": answer},
                         "gates": {"duplicate_share": 1.0, "flat_share": 1.0}},
                "evaluation": {"kind": "eval", "arms": ["sft"], "prompts": 2, "temperatures": [1.0]},
            },
        },
        "seen",
    )  # fmt: skip
    run = run_recipe(made, lambda line: None)
    stored = sorted(run.path.glob("stages/*grpo*/rollouts/*.parquet"))
    read, _ = read_trajectory(stored[0])
    assert int((read.streams["cond"].ids_BP >= SEEN).sum()) == 9 * len(read)
    assert len(list((run.path / "tokens" / "seen").glob("*.safetensors"))) > 1
    lines = [json.loads(line) for line in (run.stage("grpo") / "metrics.jsonl").read_text().splitlines()]
    assert all(line["mismatch/max"] < 1e-4 for line in lines if "mismatch/max" in line)
    assert any("mismatch/max" in line for line in lines)
    found = json.loads((run.stage("evaluation") / "eval.json").read_text())["understanding"]
    assert [row["n"] for row in found] == [2]


def test_of_several_processes_each_has_a_gradient_for_the_image_head_though_none_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As plain data parallel needs it in each micro-batch: the same gradients, and zeros for what only images need."""
    policy = load_policy(tiny("janus").path, tiny("janus"))
    answer = Sampling(answer=Written(length_limit=3))
    made = answers(policy, answer, 0)

    def gradients() -> dict[str, torch.Tensor | None]:
        policy.model.zero_grad()
        policy.log_probs(made).logp_BS.sum().backward()
        return {name: one.grad for name, one in policy.base.named_parameters() if one.requires_grad}

    alone = gradients()
    monkeypatch.setattr("rlmm.policies.causal.several_processes", lambda: True)
    both = gradients()
    unused = [name for name, found in alone.items() if found is None]
    assert unused and all(name.startswith("model.generation_head.") for name in unused)
    for name, found in both.items():
        wanted = alone[name]
        assert found is not None
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted)
