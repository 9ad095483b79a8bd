"""A real next-token policy small enough to sum over every image, and the definitions its tests compare with.

A transformers Llama in float64 with 4 image codes and 3 positions, wrapped in `CausalPolicy`: 64 images a prompt. The
definitions use the bare model, one prompt at a time, without padding, masks or a cache, and none of the functions that
the tests are about.

Shapes: N images of a prompt, B rows of a trajectory, S = 3 positions, V = 4 codes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlmm.config.policy import NewPolicy
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.llama import build
from rlmm.policies.layout_io import spell_image
from rlmm.policies.transformer import TransformerPolicy
from rollouts.assembly import span_trajectory
from rollouts.contract import Request
from rollouts.law import COND, SOURCE, UNCOND, Law, pack_support
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Span, Trajectory, concatenate, pad_left

CODES, LENGTH, LAYERS = 4, 3, 2
PROMPTS = ("a", 'say "no"')
IMAGES_NS = torch.tensor(list(product(range(CODES), repeat=LENGTH)))

LAWS: dict[str, dict[str, Any]] = {
    "plain": {"mode": "none"},
    "temperature": {"temperature": 0.6},
    "guidance": {"guidance_scale": 2.5},
    "guidance, temperature": {"guidance_scale": 1.7, "temperature": 1.4},
    "two scales": {"guidance_scale": 1.8, "source_scale": 1.4},
    "two scales, temperature": {"guidance_scale": 0.6, "source_scale": 1.5, "temperature": 0.8},
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.8},
    "guidance, top-k": {"guidance_scale": 1.6, "temperature": 1.3, "top_k": 3},
    "guidance, top-k, top-p": {"guidance_scale": 1.5, "temperature": 1.5, "top_k": 3, "top_p": 0.9},
    "two scales, top-k, top-p": {"guidance_scale": 1.4, "source_scale": 0.7, "top_k": 3, "top_p": 0.85},
}


def make_policy(seed: int = 0) -> CausalPolicy:
    """A policy whose next-code laws are far from uniform and differ between prompts."""
    config = NewPolicy(hidden_size=16, num_layers=LAYERS, num_heads=2, intermediate_size=24, max_positions=64)
    policy = build(config, num_codes=CODES, grid=(1, LENGTH), seed=seed)
    assert isinstance(policy, CausalPolicy)
    randomise(policy, seed)
    return policy


def randomise(policy: TransformerPolicy, seed: int) -> None:
    """In float64, with laws far from uniform."""
    in_float64(policy)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(std=0.35, generator=generator)
    policy.model.eval()


def perturbed(policy: CausalPolicy, *, scale: float = 0.05, seed: int = 1) -> CausalPolicy:
    """A copy with noise of that standard deviation on every weight."""
    other = CausalPolicy(copy.deepcopy(policy.model), policy.tokenizer, policy.layout)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(noise, alpha=scale)
    return other


def in_float64(policy: TransformerPolicy) -> None:
    """transformers' RMSNorm computes in float32 whatever the weights are; torch's own is the same in float64."""
    model = cast(nn.Module, policy.model)
    model.double()
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            size, epsilon = cast(Tensor, module.weight).shape[0], cast(float, module.variance_epsilon)
            own = nn.RMSNorm(size, eps=epsilon, dtype=torch.float64)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, own)


def law_named(name: str, policy: CausalPolicy) -> Law:
    return Law(policy.layout.image, **LAWS[name])


def span_of(law: Law) -> Span:
    return Span("image", law, LENGTH)


def request_for(policy: CausalPolicy, prompt: str, seeds: Sequence[int]) -> Request:
    """All streams of a prompt, of different lengths; the source image's codes are 2, 0, 3."""
    layout, source = policy.layout, [spell_image(policy.layout, [2, 0, 3])]
    streams = {
        COND: layout.prefix(policy.encode_prompt(prompt), source),
        UNCOND: layout.prefix(layout.null_prompt),
        SOURCE: layout.prefix(layout.null_prompt, source),
    }
    return Request(prompt, streams, tuple(seeds), tuple(f"{prompt}/{seed}" for seed in seeds))


def draw_rows(policy: CausalPolicy, law: Law, rows: int, *, prompts: Sequence[str] = PROMPTS) -> Trajectory:
    """`rows` images of each prompt by the engine."""
    engine = TorchEngine(policy, num_layers=LAYERS)
    asked = [request_for(policy, prompt, range(rows * i, rows * (i + 1))) for i, prompt in enumerate(prompts)]
    return engine.generate(asked, [span_of(law)])


@dataclass(frozen=True)
class Table:
    """The law of one prompt: log-probs of every next code after every prefix of every image, and which are possible."""

    logp_NSV: Tensor
    support_NSV: Tensor

    def chosen(self) -> Tensor:
        """Log-prob of each code of each image [N, S]; -inf where it is impossible."""
        return self.logp_NSV.gather(-1, IMAGES_NS[..., None])[..., 0]

    def possible(self) -> Tensor:
        """Whether an image can be drawn [N]."""
        return self.support_NSV.gather(-1, IMAGES_NS[..., None])[..., 0].all(1)

    def probability(self) -> Tensor:
        """Of each image [N]."""
        return self.chosen().sum(1).exp()


def table(policy: CausalPolicy, law: Law, prompt: str, *, support_NSV: Tensor | None = None) -> Table:
    """The law by its definition, with gradient; over the given support, else over its own."""
    stream = {name: _logits(policy, prefix, law) for name, prefix in request_for(policy, prompt, ()).streams.items()}
    cond, uncond, source = (stream[name] for name in (COND, UNCOND, SOURCE))
    if law.source_scale is not None:
        mixed = uncond + law.source_scale * (source - uncond) + law.guidance_scale * (cond - source)
    else:
        mixed = uncond + law.guidance_scale * (cond - uncond)
    tempered_NSV = mixed / law.temperature
    if support_NSV is None:
        kept = [_support(row, law) for row in tempered_NSV.detach().flatten(0, 1).softmax(-1).tolist()]
        support_NSV = torch.tensor(kept).view(tempered_NSV.shape)
    weight_NSV = torch.where(support_NSV, (tempered_NSV - tempered_NSV.detach().amax(-1, keepdim=True)).exp(), 0.0)
    share_NSV = torch.where(support_NSV, weight_NSV / weight_NSV.sum(-1, keepdim=True), 1.0)
    return Table(torch.where(support_NSV, share_NSV.log(), -torch.inf), support_NSV)


def _logits(policy: CausalPolicy, prefix: Sequence[int], law: Law) -> Tensor:
    given = torch.tensor(prefix).expand(len(IMAGES_NS), -1)
    ids = torch.cat([given, IMAGES_NS[:, :-1] + policy.layout.image[0]], 1)
    logits = cast(Any, policy.model)(input_ids=ids).logits
    return logits[:, len(prefix) - 1 :, slice(*law.vocabulary)]


def _support(probability: Sequence[float], law: Law) -> list[bool]:
    """Top-k, then the smallest set of the rest's most probable whose mass reaches p."""
    ranked = sorted(range(len(probability)), key=lambda code: -probability[code])[: law.top_k or None]
    mass, reached, kept = sum(probability[code] for code in ranked), 0.0, []
    for code in ranked:
        if reached < law.top_p:
            kept.append(code)
        reached += probability[code] / mass
    return [code in kept for code in range(len(probability))]


@dataclass(frozen=True)
class Decision:
    """All next-code decisions at one position: M prefixes with a next code each, every possible one once.

    head_M: an image (row of `IMAGES_NS`) that begins so; prefix_M: the prefix's probability; gain_M: the expected
    reward of an image that begins so. The last two under the sampling law, without gradient.
    """

    position: int
    head_M: Tensor
    prefix_M: Tensor
    gain_M: Tensor

    def logp(self, known: Table) -> Tensor:
        """Log-prob of each decision under a law over the same support [M]."""
        return known.chosen()[self.head_M, self.position]


def decisions(sampling: Table, reward_N: Tensor) -> list[Decision]:
    """The decisions of the three positions under the sampling law."""
    chance_NS, made = sampling.chosen().detach().exp(), []
    chance_N = chance_NS.prod(1)
    for position in range(LENGTH):
        size = CODES ** (LENGTH - 1 - position)
        head_M = torch.arange(0, len(IMAGES_NS), size)
        reached_M, mass_M = chance_NS[head_M, : position + 1].prod(1), chance_N.view(-1, size).sum(1)
        gain_M = (chance_N * reward_N).view(-1, size).sum(1) / mass_M
        keep_M = reached_M > 0
        prefix_M = chance_NS[head_M, :position].prod(1)
        made.append(Decision(position, head_M[keep_M], prefix_M[keep_M], gain_M[keep_M]))
    return made


def every_image(policy: CausalPolicy, law: Law, prompts: Sequence[str] = PROMPTS) -> Trajectory:
    """Every possible image of each prompt, with the log-probs and supports of the definition."""
    return concatenate([_images_of(policy, law, prompt) for prompt in prompts], policy.layout.pad)


def _images_of(policy: CausalPolicy, law: Law, prompt: str) -> Trajectory:
    with torch.no_grad():
        known = table(policy, law, prompt)
    where = known.possible()
    count = int(where.sum())
    request = request_for(policy, prompt, range(count))
    streams = {name: pad_left([request.streams[name]] * count, policy.layout.pad) for name in law.streams()}
    return span_trajectory(
        policy.layout,
        span_of(law),
        [request],
        streams=streams,
        ids_BS=IMAGES_NS[where] + policy.layout.image[0],
        logp_BS=known.chosen()[where],
        support=pack_support(known.support_NSV[where]) if law.truncated else None,
        weights_version=0,
    )


def place(trajectory: Trajectory, policy: CausalPolicy) -> Tensor:
    """Row of `IMAGES_NS` that each row of a trajectory is [B]."""
    codes_BS = trajectory.ids - policy.layout.image[0]
    return (codes_BS * torch.tensor([CODES**2, CODES, 1])).sum(1)


def widened(trajectory: Trajectory, columns: int) -> Trajectory:
    """The same rows with that many more columns of padding before every prefix."""
    grow = (columns, 0)
    streams = {
        name: type(s)(nn.functional.pad(s.ids_BP, grow), nn.functional.pad(s.mask_BP, grow))
        for name, s in trajectory.streams.items()
    }
    return replace(trajectory, streams=streams)


def rewards(prompts: int = len(PROMPTS), seed: int = 5) -> Tensor:
    """A reward of each image for each prompt [prompts, N]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompts, len(IMAGES_NS), generator=generator, dtype=torch.float64)


def gradient(policy: CausalPolicy, value: Tensor) -> Tensor:
    """Of a value with respect to all the policy's weights, as one vector."""
    weights = list(policy.model.parameters())
    parts = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, parts, strict=True)])


def assert_same(found: Tensor, expected: Tensor, relative: float = 1e-9) -> None:
    """Equal to that share of the expected vector's largest entry, which must not be 0."""
    scale = float(expected.detach().abs().max())
    assert scale > 1e-6, "the expected vector is (nearly) 0: this comparison could not fail"
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * scale)
