"""What `rlmm bench rollout` samples: a random Llama, 20-token prompts, and both ways to sample from it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlmm.bench.machine import Shape
from rlmm.config.engines import EngineConfig, TorchEngineConfig, VllmEngineConfig
from rlmm.config.policy import Lora, NewPolicy
from rlmm.policies.families.llama import build
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.engines import build_engine
from rlmm.train.gates import Mismatch, measure_mismatch
from rollouts.contract import Request
from rollouts.law import Law
from rollouts.trajectory import Span, Trajectory
from rollouts.vllm_engine.engine import VllmEngine
from rollouts.vllm_engine.host import BLOCK

PROMPT = 20
"""Prefix tokens of every conditional row."""


@dataclass(frozen=True)
class Size:
    """A model, its image codes, and how many samples share a prompt."""

    model: NewPolicy
    codes: int
    group: int = 1


SIZES = {
    "tiny": Size(NewPolicy(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48), 64, group=2),
    "quickstart": Size(NewPolicy(hidden_size=128, num_layers=4, num_heads=4, intermediate_size=384), 240, group=8),
    "5m": Size(NewPolicy(hidden_size=256, num_layers=6, num_heads=8, intermediate_size=688), 1024),
    "50m": Size(NewPolicy(hidden_size=640, num_layers=10, num_heads=10, intermediate_size=1728), 1024),
    # The language models of Janus-Pro 1B and 7B.
    "1b": Size(NewPolicy(hidden_size=2048, num_layers=24, num_heads=16, intermediate_size=5632), 16384),
    "7b": Size(NewPolicy(hidden_size=4096, num_layers=30, num_heads=32, intermediate_size=11008), 16384),
}


def known_sizes() -> list[str]:
    return list(SIZES)


@dataclass(frozen=True)
class Case:
    """One line of the benchmark. `guidance_scale` 1 samples without guidance."""

    size: str
    precision: str
    guidance_scale: float
    samples: int
    tokens: int

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    def __str__(self) -> str:
        return f"{self.size} {self.precision}{' guided' if self.guided else ''}"


LORA = "-lora"
_BY_KIND = ("torch", "vllm", "vllm-pairs", "vllm-compiled")
ENGINES = (*_BY_KIND, *(f"{name}{LORA}" for name in _BY_KIND))
"""What can be measured; `vllm-pairs` draws a guided sample in two requests, `vllm-compiled` has a compiled model, and
`-lora` means that the policy has an adapter, where else its weights are plain (as merged ones are)."""


class Problem:
    """A case with its model, ready to be sampled from."""

    def __init__(self, case: Case, engines: Sequence[str] = ("torch",)) -> None:
        self.case, self.size = case, SIZES[case.size]
        if case.samples % self.size.group:
            raise ValueError(
                f"{case.samples} samples are not whole groups: size {case.size} draws {self.size.group} a prompt; "
                f"give --samples a multiple of {self.size.group}"
            )
        shape = self.size.model.model_copy(update={"max_positions": PROMPT + case.tokens})
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = _policy(shape, self.size.codes, case.tokens)
        self.policy.to(self.device)
        self.policy.precision = case.precision
        self.policies = {name: self._adapted if name.endswith(LORA) else self.policy for name in engines}
        self.law = Law(self.policy.layout.image, guidance_scale=case.guidance_scale)
        self.engines = {
            name: build_engine(self._engine_config(name), self.policies[name], self.law) for name in engines
        }

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in cast(nn.Module, self.policy.model).parameters())

    @property
    def kernels(self) -> bool:
        """Whether the torch engine has its compiled ones."""
        own = (getattr(self.engines.get(name), "packed", None) for name in ("torch", f"torch{LORA}"))
        return any(packed is not None and packed.kernels is not None for packed in own)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    def _engine_config(self, name: str) -> EngineConfig:
        case, config = self.case, cast(Any, self.policy.base.config)
        rows, kind = 2 * case.samples, name.removesuffix(LORA)
        if kind == "torch":
            return TorchEngineConfig(max_rows=rows)
        blocks = rows * (-(-(PROMPT + case.tokens) // BLOCK) + 2)
        bytes_each = 2 if case.precision == "bfloat16" else 4
        size = blocks * BLOCK * config.num_hidden_layers * 2 * config.hidden_size * bytes_each
        return VllmEngineConfig(
            max_rows=rows, max_prompt_tokens=rows * PROMPT, kv_megabytes=(size >> 20) + 1,
            two_streams=kind != "vllm-pairs", enforce_eager=kind != "vllm-compiled",
        )  # fmt: skip

    def product_shapes(self) -> list[Shape]:
        """The matrix products of one decode step: the body in the case's dtype, the sliced head in float32."""
        config, rows = cast(Any, self.policy.base.config), self.case.samples * (2 if self.case.guided else 1)
        hidden, inner = config.hidden_size, config.intermediate_size
        dtype, layers = getattr(torch, self.case.precision), config.num_hidden_layers
        body = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]
        low, high = self.law.vocabulary
        head = Shape(rows, hidden, high - low, torch.float32, 1)
        return [*(Shape(rows, ins, outs, dtype, layers) for ins, outs in body), head]

    def sample(self, engine: str = "torch") -> Trajectory:
        """An engine's way. As in a step of training, no keys and values of these prompts are there before."""
        sampler = self.engines[engine]
        if isinstance(sampler, VllmEngine):
            for host in sampler.hosts:
                host.forget()
        layout, span, group = self.policy.layout, Span("image", self.law, self.case.tokens), self.size.group
        uncond = layout.prefix(layout.null(range(PROMPT - len(layout.prefix(())))))
        requests = [
            Request(
                str(row),
                {"cond": tuple(ids), "uncond": uncond},
                tuple(range(row, row + group)),
                tuple(map(str, range(row, row + group))),
            )
            for row, ids in list(enumerate(self._prefix_BP.tolist()))[::group]
        ]
        return sampler.generate(requests, [span])

    def generate(self, tokens: int | None = None) -> Tensor:
        """transformers' way, as a user would: the model in the dtype, its own cache, its own guidance."""
        length, layout = tokens or self.case.tokens, self.policy.layout
        guidance: dict[str, Any] = {}
        if self.case.guided:
            null_ids = layout.null(range(PROMPT - len(layout.prefix(()))))
            null = torch.tensor(layout.prefix(null_ids)).expand(self.case.samples, -1)
            null = null.to(self.device)
            guidance = {"guidance_scale": self.case.guidance_scale, "negative_prompt_ids": null}
        with torch.no_grad():
            return self._plain_model.generate(
                self._prefix_BP.to(self.device),
                attention_mask=torch.ones_like(self._prefix_BP, device=self.device),
                do_sample=True,
                top_k=0,
                min_new_tokens=length,
                max_new_tokens=length,
                **guidance,
            )

    def warm_up_generate(self) -> None:
        self.generate(min(4, self.case.tokens))

    @torch.no_grad()
    def mismatch(self, engine: str = "torch") -> Mismatch:
        """|trainer - sampler| log-prob over every token of one batch."""
        made = self.sample(engine)
        parts = [made.rows(range(at, min(at + 16, len(made)))) for at in range(0, len(made), 16)]
        logp_BS = torch.cat([self.policies[engine].log_probs(part.to(self.device)).logp_BS.cpu() for part in parts])
        return measure_mismatch(logp_BS, made.sampler_logp, made.target_mask)

    @cached_property
    def _adapted(self) -> TransformerPolicy:
        """The policy with an adapter that is not nothing, as a fresh one would be."""
        policy = copy.deepcopy(self.policy)
        policy.add_lora(Lora(), seed=0)
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.02, generator=torch.Generator(weight.device).manual_seed(0))
        policy.to(self.device)
        policy.model.eval()
        return policy

    @cached_property
    def _plain_model(self) -> Any:
        return copy.deepcopy(cast(Any, self.policy.base)).to(getattr(torch, self.case.precision)).eval()

    @cached_property
    def _prefix_BP(self) -> Tensor:
        """A prefix a sample, equal within a group."""
        layout = self.policy.layout
        room = PROMPT - len(layout.prefix(()))
        texts = [f"render {row // self.size.group}".ljust(room, "a")[:room] for row in range(self.case.samples)]
        return torch.tensor([layout.prefix(self.policy.encode_prompt(text)) for text in texts])


def _policy(shape: NewPolicy, codes: int, tokens: int) -> TransformerPolicy:
    """A random policy, its head enlarged: a fresh one is nearly uniform, and rounding would hide in that."""
    policy = build(shape.model_copy(update={"null": "token"}), num_codes=codes, grid=(1, tokens), seed=0)
    head = cast(nn.Linear, policy.base.get_output_embeddings())
    with torch.no_grad():
        head.weight.mul_(5.0)
    cast(nn.Module, policy.model).eval()
    return policy
