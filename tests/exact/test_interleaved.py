"""A text and the image it leads to: what is sampled, what the trainer differentiates, and a sum over all of them."""

import dataclasses
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlmm.policies.causal import CausalPolicy
from rollouts.contract import Request
from rollouts.interleaved import generate_spans, span_seed
from rollouts.law import COND, UNCOND, Law
from rollouts.store import read_trajectory, write_trajectory
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Span, Trajectory
from tests.exact.enumerable import LAYERS, LENGTH, make_policy

WORDS = (20, 23)
STOP, LIMIT = 22, 2
TEXTS = [(STOP,), (20, STOP), (21, STOP), *product((20, 21), repeat=LIMIT)]
THOUGHT = Span("text", Law(WORDS, temperature=0.9), LIMIT, stop=(STOP,))


def image_span(policy: CausalPolicy, scale: float = 1.8) -> Span:
    return Span("image", Law(policy.layout.image, guidance_scale=scale, temperature=1.2), LENGTH)


def request_for(policy: CausalPolicy, prompt: str, seeds: range) -> Request:
    layout = policy.layout
    streams = {
        COND: layout.question(policy.encode_prompt(prompt)),
        UNCOND: layout.question(layout.null_prompt),
    }
    return Request(prompt, streams, tuple(seeds), tuple(f"{prompt}/{seed}" for seed in seeds))


def draw(
    policy: CausalPolicy, rows: int, spans: tuple[Span, ...], prompts: tuple[str, ...] = ("a", 'say "no"')
) -> Trajectory:
    asked = [request_for(policy, prompt, range(rows * i, rows * (i + 1))) for i, prompt in enumerate(prompts)]
    return generate_spans(TorchEngine(policy, num_layers=LAYERS), policy.layout, asked, spans)


def by_definition(policy: CausalPolicy, prompt: str, text: list[int], image: list[int], law: Law) -> Tensor:
    """The log-prob of a text and an image: bare model, one row, no padding, no cache."""
    layout = policy.layout
    cond = [*layout.question(policy.encode_prompt(prompt)), *text, *layout.boi]
    uncond = [*layout.question(layout.null_prompt), *layout.boi]

    def logits(prefix: list[int]) -> Tensor:
        return policy.base(torch.tensor([[*prefix, *image]])).logits[0, len(prefix) - 1 : -1]

    start = len(cond) - len(layout.boi) - len(text)
    written = policy.base(torch.tensor([cond])).logits[0, start - 1 : start - 1 + len(text), WORDS[0] : WORDS[1]]
    written = (written / THOUGHT.law.temperature).log_softmax(-1)
    c, u = (logits(prefix)[:, slice(*law.vocabulary)] for prefix in (cond, uncond))
    drawn = ((u + law.guidance_scale * (c - u)) / law.temperature).log_softmax(-1)
    at_text = written.gather(1, torch.tensor(text)[:, None] - WORDS[0])
    at_image = drawn.gather(1, torch.tensor(image)[:, None] - law.vocabulary[0])
    return at_text.sum() + at_image.sum()


def parts(made: Trajectory, row: int) -> tuple[list[int], list[int]]:
    """Text and image of a row."""
    text = made.ids[row, made.target_mask[row] & (made.span[row] == 0)].tolist()
    return text, made.ids[row, made.target_mask[row] & (made.span[row] == 1)].tolist()


def test_a_trajectory_has_the_log_prob_of_its_definition_in_sampler_and_trainer() -> None:
    policy = make_policy()
    spans = (THOUGHT, image_span(policy))
    made = draw(policy, 40, spans)
    texts = [parts(made, row) for row in range(len(made))]
    assert {len(text) for text, _ in texts} == {1, 2}, "texts of several lengths, or padding is not tested"
    expected = torch.stack([by_definition(policy, made.group_id[r], *texts[r], spans[1].law) for r in range(len(made))])
    with torch.no_grad():
        trained = policy.log_probs(made).logp_BS.sum(1)
    assert (made.sampler_logp.sum(1) - expected).abs().max() < 1e-10
    assert (trained - expected).abs().max() < 1e-10


def test_the_gradient_is_that_of_the_definition() -> None:
    policy = make_policy()
    spans = (THOUGHT, image_span(policy))
    made = draw(policy, 6, spans)
    weight_B = torch.linspace(-1, 1, len(made), dtype=torch.float64)
    parameters = list(policy.model.parameters())
    found = torch.autograd.grad((policy.log_probs(made).logp_BS.sum(1) * weight_B).sum(), parameters)
    rows = [by_definition(policy, made.group_id[r], *parts(made, r), spans[1].law) for r in range(len(made))]
    for one, other in zip(found, torch.autograd.grad((torch.stack(rows) * weight_B).sum(), parameters), strict=True):
        assert (one - other).abs().max() < 1e-10


def test_what_is_drawn_follows_the_law_over_all_texts_and_images() -> None:
    policy = make_policy()
    spans, rows = (THOUGHT, image_span(policy)), 3000
    made = draw(policy, rows, spans, prompts=("a",))
    low = policy.layout.image[0]
    outcomes = [(text, tuple(low + c for c in image)) for text in TEXTS for image in product(range(4), repeat=LENGTH)]
    with torch.no_grad():
        logp = [by_definition(policy, "a", list(text), list(image), spans[1].law) for text, image in outcomes]
    probability = torch.stack(logp).exp()
    assert abs(float(probability.sum()) - 1) < 1e-10
    place = {outcome: i for i, outcome in enumerate(outcomes)}
    drawn = [(tuple(text), tuple(image)) for text, image in (parts(made, row) for row in range(rows))]
    counts = torch.bincount(torch.tensor([place[outcome] for outcome in drawn]), minlength=len(outcomes)).double()
    likely = rows * probability >= 5
    chi2 = ((counts - rows * probability)[likely] ** 2 / (rows * probability[likely])).sum()
    freedom = int(likely.sum()) - 1
    assert float(chi2) < freedom + 4 * (2 * freedom) ** 0.5
    assert abs(float(counts[~likely].sum()) - rows * float(probability[~likely].sum())) < 4 * rows**0.5


def test_rows_do_not_depend_on_the_batch_and_one_span_draws_as_it_did_alone() -> None:
    policy = make_policy()
    spans = (THOUGHT, image_span(policy))
    whole, part = draw(policy, 8, spans), draw(policy, 8, spans, prompts=("a",))
    assert torch.equal(whole.ids[:8], part.ids)
    engine = TorchEngine(policy, num_layers=LAYERS)
    alone = engine.generate([request_for(policy, "a", range(8))], [THOUGHT])
    assert torch.equal(whole.ids[:8, :LIMIT], alone.ids)
    assert span_seed(7, 0) == 7 and len({span_seed(seed, 1) for seed in range(100)} | {7}) == 101


def test_text_and_image_are_laid_out_alike_in_every_row() -> None:
    policy = make_policy()
    made = draw(policy, 30, (THOUGHT, image_span(policy)))
    boi = len(policy.layout.boi)
    assert made.ids.shape[1] == LIMIT + boi + LENGTH
    assert made.ids[:, LIMIT : LIMIT + boi].tolist() == [list(policy.layout.boi)] * len(made)
    assert not made.target_mask[:, LIMIT : LIMIT + boi].any() and made.attention_mask[:, LIMIT:].all()
    assert made.modality[:, :LIMIT].max() == 0 and made.modality[:, LIMIT:].min() == 1
    for row in range(len(made)):
        text, image = parts(made, row)
        assert tuple(text) in TEXTS and len(image) == LENGTH
    uncond = made.streams[UNCOND]
    assert made.streams[COND].sees_BS is None and uncond.sees_BS is not None
    assert not uncond.sees_BS[:, :LIMIT].any() and uncond.sees_BS[:, LIMIT:].all()


@pytest.mark.parametrize(("text_k", "image_k"), [(2, 3), (2, 0), (0, 3)])
def test_supports_of_the_spans_are_kept_and_survive_the_disk(tmp_path: Path, text_k: int, image_k: int) -> None:
    policy = make_policy()
    thought = dataclasses.replace(THOUGHT, law=dataclasses.replace(THOUGHT.law, top_k=text_k))
    image = dataclasses.replace(image_span(policy), law=dataclasses.replace(image_span(policy).law, top_k=image_k))
    made = draw(policy, 20, (thought, image))
    write_trajectory(tmp_path / "made.parquet", made, {})
    read, _ = read_trajectory(tmp_path / "made.parquet")
    for trajectory in (made, read, read.rows([3, 0, 11])):
        with torch.no_grad():
            found = policy.log_probs(trajectory).logp_BS
        assert (found - trajectory.sampler_logp)[trajectory.target_mask].abs().max() < 1e-10


def test_without_what_the_unconditional_stream_does_not_see_the_log_probs_are_others() -> None:
    policy = make_policy()
    made = draw(policy, 20, (THOUGHT, image_span(policy)))
    streams = {name: dataclasses.replace(stream, sees_BS=None) for name, stream in made.streams.items()}
    with torch.no_grad():
        wrong = policy.log_probs(dataclasses.replace(made, streams=streams)).logp_BS
    assert (wrong - made.sampler_logp)[made.target_mask].abs().max() > 1e-2


def test_other_spans_are_refused() -> None:
    policy = make_policy()
    image = image_span(policy)
    with pytest.raises(ValueError, match="a text and then an image"):
        draw(policy, 1, (image, THOUGHT))
    guided = dataclasses.replace(THOUGHT, law=Law(WORDS, guidance_scale=2.0))
    with pytest.raises(ValueError, match="set it to 1"):
        draw(policy, 1, (guided, image))
    with pytest.raises(ValueError, match="one span at a time"):
        TorchEngine(policy, num_layers=LAYERS).generate([request_for(policy, "a", range(1))], [THOUGHT, image])
    with pytest.raises(ValueError, match="could never end it"):
        Span("text", Law(WORDS), 2, stop=(3,))
    with pytest.raises(ValueError, match="leave `stop` out"):
        Span("image", Law(WORDS), 2, stop=(20,))
