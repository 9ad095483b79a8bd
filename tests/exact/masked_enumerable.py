"""A real masked policy small enough to sum over every image and order, and the definitions its tests compare with.

A bidirectional transformers Llama in float64 with 4 image codes and 3 positions: 64 images, 6 orders, 125 states a
prompt. The definitions use the bare model, one prompt at a time, and none of the functions that the tests are about.

Shapes: N = 64 images, C = 125 states (each position a code, or masked), S = 3 positions, V = 4 codes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, cast

import torch
from torch import Tensor

from rlmm.config.policy import NewPolicy
from rlmm.policies.families.llama import build
from rlmm.policies.masked import MaskedPolicy
from rollouts.assembly import span_trajectory
from rollouts.contract import Request
from rollouts.law import COND, SOURCE, UNCOND, Law
from rollouts.torch_engine.masked import MaskedTorchEngine
from rollouts.trajectory import Span, Trajectory, pad_left
from rollouts.unmasking import Unmasking
from tests.exact.enumerable import randomise

CODES, LENGTH, MASKED = 4, 3, 4
IMAGES_NS = torch.tensor(list(product(range(CODES), repeat=LENGTH)))
STATES_CS = torch.tensor(list(product(range(CODES + 1), repeat=LENGTH)))
ORDERS = list(permutations(range(LENGTH)))
PROMPT = "ab"
LAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "guidance": {"guidance_scale": 2.5},
    "guidance, temperature": {"guidance_scale": 1.7, "temperature": 1.4},
    "guidance by text and source": {"guidance_scale": 2.0, "source_scale": 1.5},
}


def make_policy(seed: int = 0, **settings: Any) -> MaskedPolicy:
    shape: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    config = NewPolicy(family="masked", max_positions=64, **shape, **settings)
    policy = build(config, num_codes=CODES, grid=(1, LENGTH), seed=seed)
    assert isinstance(policy, MaskedPolicy)
    randomise(policy, seed)
    return policy


def law_named(name: str, policy: MaskedPolicy) -> Law:
    return Law(policy.layout.image, **LAWS[name])


def request_for(policy: MaskedPolicy, seeds: Sequence[int], prompt: str = PROMPT) -> Request:
    """Streams of different lengths."""
    streams = {
        COND: policy.layout.prefix(policy.encode_prompt(prompt)),
        UNCOND: policy.layout.prefix(policy.layout.null([])),
        # What a source image would stand for: another condition than the prompt's, of its own length.
        SOURCE: policy.layout.prefix(policy.encode_prompt(prompt[::-1] + "c")),
    }
    return Request(prompt, streams, tuple(seeds), tuple(f"{prompt}/{seed}" for seed in seeds))


def sample(policy: MaskedPolicy, law: Law, unmasking: Unmasking, rows: int, **engine: Any) -> Trajectory:
    span = Span("image", law, LENGTH, unmasking=unmasking)
    return MaskedTorchEngine(policy, **engine).generate([request_for(policy, range(rows))], [span])


def trajectory_of(
    policy: MaskedPolicy, law: Law, unmasking: Unmasking, images_NS: Tensor, step_NS: Tensor, prompt: str = PROMPT
) -> Trajectory:
    """These images, revealed so."""
    rows = len(images_NS)
    request = request_for(policy, range(rows), prompt)
    streams = {name: pad_left([request.streams[name]] * rows, policy.layout.pad) for name in law.streams()}
    return span_trajectory(
        policy.layout, Span("image", law, LENGTH, unmasking=unmasking), [request], streams=streams,
        ids_BS=images_NS + policy.layout.image[0], logp_BS=torch.zeros(rows, LENGTH, dtype=torch.float64), support=None,
        weights_version=0, step_BS=step_NS.int(),
    )  # fmt: skip


def table(policy: MaskedPolicy, law: Law, prompt: str = PROMPT) -> Tensor:
    """Log-probs [C, S, V] of every code at every position of every state, under the law, with gradient."""
    streams, by_name = request_for(policy, (), prompt).streams, {}
    for name in law.streams():
        given = torch.tensor(streams[name]).expand(len(STATES_CS), -1)
        codes = torch.where(STATES_CS == MASKED, policy.mask, STATES_CS + policy.layout.image[0])
        ids = torch.cat([given, codes], 1)
        # A mask of zeros is added to the scores: every position sees every other.
        seen = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.float64)
        for position in range(given.shape[1] if policy.layout.causal_prompt else 0):
            seen[:, :, position, position + 1 :] = -torch.inf
        logits = cast(Any, policy.model)(input_ids=ids, attention_mask=seen).logits
        by_name[name] = logits[:, given.shape[1] :, slice(*law.vocabulary)]
    mixed = by_name[COND]
    if law.source_scale is not None:
        by_source, by_text = by_name[SOURCE] - by_name[UNCOND], by_name[COND] - by_name[SOURCE]
        mixed = by_name[UNCOND] + law.source_scale * by_source + law.guidance_scale * by_text
    elif law.guided:
        mixed = by_name[UNCOND] + law.guidance_scale * (by_name[COND] - by_name[UNCOND])
    return (mixed / law.temperature).log_softmax(-1)


def state(image: Sequence[int], known: Sequence[int]) -> int:
    """The number of the state in which only the positions `known` of an image are decided."""
    codes = [image[i] if i in known else MASKED for i in range(LENGTH)]
    return (codes[0] * (CODES + 1) + codes[1]) * (CODES + 1) + codes[2]


def order_log_prob(table_CSV: Tensor, image: Sequence[int], order: Sequence[int]) -> Tensor:
    """log-prob of an image decided one position at a time."""
    terms = [table_CSV[state(image, order[:k]), at, image[at]] for k, at in enumerate(order)]
    return torch.stack(terms).sum()


def step_log_prob(table_CSV: Tensor, image: Sequence[int], steps: Sequence[int]) -> Tensor:
    """log-prob of an image's tokens where position i is decided at step `steps[i]`, those of a step independently."""
    terms = [
        table_CSV[state(image, [j for j in range(LENGTH) if steps[j] < steps[at]]), at, image[at]]
        for at in range(LENGTH)
    ]
    return torch.stack(terms).sum()


def image_log_probs(table_CSV: Tensor) -> Tensor:
    """log pi(x) [N] of random orders, one position a step: the mean over orders of each image's chance."""
    rows = [
        torch.stack([order_log_prob(table_CSV, image, order) for order in ORDERS]).logsumexp(0)
        for image in IMAGES_NS.tolist()
    ]
    return torch.stack(rows) - torch.tensor(float(len(ORDERS))).double().log()


def elbos(table_CSV: Tensor) -> Tensor:
    """The any-order bound [N]: the mean over orders of each image's log-prob."""
    return torch.stack(
        [
            torch.stack([order_log_prob(table_CSV, image, order) for order in ORDERS]).mean()
            for image in IMAGES_NS.tolist()
        ]
    )


@dataclass(frozen=True)
class Path:
    """A way of confident decoding: the image, the step of each position, and its chance with gradient."""

    image: tuple[int, ...]
    steps: tuple[int, ...]
    chance: Tensor


def confident_paths(table_CSV: Tensor, counts: Sequence[int], threshold: float | None = None) -> list[Path]:
    """Every way of decoding by confidence, by summing over all proposals at every step."""
    merged: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
    start = ([MASKED] * LENGTH, [-1] * LENGTH, torch.ones((), dtype=torch.float64))
    for image, steps, chance in _reveal(table_CSV, counts, threshold, 0, *start):
        key = (tuple(image), tuple(steps))
        merged[key] = merged.get(key, torch.zeros(())) + chance
    return [Path(image, steps, chance) for (image, steps), chance in merged.items()]


def _reveal(
    table_CSV: Tensor, counts: Sequence[int], threshold: float | None, step: int, image: list[int], steps: list[int],
    chance: Tensor,
) -> Iterator[tuple[list[int], list[int], Tensor]]:  # fmt: skip
    masked = [i for i in range(LENGTH) if image[i] == MASKED]
    if not masked:
        yield image, steps, chance
        return
    here_SV = table_CSV[state(image, [i for i in range(LENGTH) if image[i] != MASKED])]
    for proposal in product(range(CODES), repeat=len(masked)):
        sure = {i: round(float(here_SV[i, code].detach()) * 8192) for i, code in zip(masked, proposal, strict=True)}
        ranked = sorted(masked, key=lambda i: -sure[i])
        keep = len(masked) - counts[step]
        if threshold is not None and step < len(counts) - 1:
            bound = round(math.log(threshold) * 8192)
            keep = max(1, sum(value >= bound for value in sure.values()))
        chosen = ranked[: keep if step < len(counts) - 1 else len(masked)]
        codes = dict(zip(masked, proposal, strict=True))
        together = chance * torch.stack([here_SV[i, codes[i]] for i in masked]).sum().exp()
        after = [codes[i] if i in chosen else image[i] for i in range(LENGTH)]
        when = [step if i in chosen else steps[i] for i in range(LENGTH)]
        yield from _reveal(table_CSV, counts, threshold, step + 1, after, when, together)
