"""Rollout engines by the kind a recipe names."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlmm.config.engines import EngineConfig, TorchEngineConfig, VllmEngineConfig, VllmServerConfig, VllmSizes
from rlmm.policies.masked import MaskedPolicy
from rlmm.policies.saving import by_this_process
from rlmm.policies.spelling import Spelling
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.processes import world
from rlmm.train.recovery import Recovering
from rollouts.contract import Engine
from rollouts.law import Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.torch_engine.llama import Unsupported, llama_shape
from rollouts.torch_engine.masked import MaskedTorchEngine
from rollouts.torch_engine.packed import PackedLlama
from rollouts.vllm_engine.plugin import STREAMS, served_overrides

log = logging.getLogger(__name__)

Kept = tempfile.TemporaryDirectory[str] | None
"""The folder of the model that servers are started from, as long as the engine lives."""


def build_engine(
    config: EngineConfig, policy: TransformerPolicy, law: Law | None = None, *, parting: bool = False
) -> Engine:
    """The engine of a stage, best prepared for `law` (it can sample from others). `parting`: training is to keep the
    policy's weights in parts, so that they cannot be saved again. A new kind is one config class in
    `rlmm.config.engines` and one entry here."""
    return ENGINES[config.kind](config, policy, law, parting)


def within(config: EngineConfig, spelling: Spelling) -> Spelling:
    """How prompts are spelled that the engine can take: its positions are those that it is started with."""
    if not isinstance(config, VllmSizes):
        return spelling
    return replace(spelling, positions=config.positions(spelling.positions))


def _torch(config: TorchEngineConfig, policy: TransformerPolicy, law: Law | None, parting: bool) -> Engine:
    if isinstance(policy, MaskedPolicy):
        return MaskedTorchEngine(policy, max_rows=config.max_rows)
    layers, packed = policy.sizes.num_hidden_layers, packed_decoder(policy)
    return TorchEngine(policy, num_layers=layers, max_rows=config.max_rows, packed=packed)


def packed_decoder(policy: TransformerPolicy) -> PackedLlama | None:
    """The packed decoder where the policy's model is one it computes exactly; None, and the reason logged, where not.

    Both ways sample from the same law and differ in rounding alone. The dtype is that of the stage's precision.
    """
    try:
        shape = llama_shape(policy.base)
    except Unsupported as reason:
        log.warning("sampling through the model's own forward, the slower way: %s", reason)
        return None
    packed = PackedLlama(shape, torch.bfloat16 if policy.precision == "bfloat16" else torch.float32)
    if packed.kernels is not None:
        log.info("sampling through the packed decoder with compiled kernels")
    else:
        log.warning("sampling through the packed decoder without compiled kernels: %s", packed.without)
    return packed


def _vllm(config: VllmEngineConfig, policy: TransformerPolicy, law: Law | None, parting: bool) -> Engine:
    from rollouts.vllm_engine.engine import VllmEngine
    from rollouts.vllm_engine.local import LocalHost

    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        sees = policy.pictures is not None
        host = LocalHost(Path(folder), sleep=config.sleep, embeds=sees, **_served(config, policy, law))
        return VllmEngine(policy.layout, [host], host.load, partial(_embedded, policy) if sees else None)


def _embedded(policy: TransformerPolicy, prefix: tuple[int, ...]) -> Tensor:
    """What the policy's own embeddings and encoder make of a prefix [P, H], under its present weights."""
    ids_BT = torch.tensor([prefix], device=policy.base.device)
    return policy.embedded(ids_BT)["inputs_embeds"][0].cpu()


def _vllm_server(config: VllmServerConfig, policy: TransformerPolicy, law: Law | None, parting: bool) -> Engine:
    kept = tempfile.TemporaryDirectory() if parting and not config.urls else None
    return Recovering(lambda: _connected(config, policy, law, kept), policy)


def _connected(config: VllmServerConfig, policy: TransformerPolicy, law: Law | None, kept: Kept) -> Engine:
    from rollouts.vllm_engine.engine import VllmEngine
    from rollouts.vllm_engine.server import ServerHost

    with ExitStack() as opened:  # closed, and servers of our own ended, unless there is an engine at the end
        if config.urls:
            token = _token(config)
            hosts = [opened.enter_context(closing(ServerHost(url, token=token))) for url in _own_urls(config.urls)]
        else:
            hosts = [opened.enter_context(closing(host)) for host in _started(config, policy, law, kept)]
        engine = VllmEngine(policy.layout, hosts, _transfer(config, hosts, policy.base.device))
        opened.pop_all()
    return engine


def _started(config: VllmServerConfig, policy: TransformerPolicy, law: Law | None, kept: Kept) -> Sequence[Any]:
    from rollouts.vllm_engine.launch import ServerPlan, visible_device
    from rollouts.vllm_engine.server import start_servers

    check_gpus(config)
    device = visible_device(policy.base.device)
    with _model_folder(policy, kept) as folder:
        served = _served(config, policy, law)
        plan = ServerPlan(folder, tensor_parallel=config.tensor_parallel, device=device, **served)
        return start_servers(plan, config.replicas, config.start_seconds)


def check_gpus(config: VllmServerConfig) -> None:
    """A run starts one server, on the GPU of the process that trains: more would share it, or take those of other
    processes. Raises ValueError where more are asked for."""
    counts = {"replicas": config.replicas, "tensor_parallel": config.tensor_parallel}
    asked = [f"{name}: {count}" for name, count in counts.items() if count > 1]
    if asked and not config.urls and torch.cuda.is_available():
        raise ValueError(
            f"{' and '.join(asked)}: a run starts its server on the GPU of the process that trains, and on no other; "
            "start `CUDA_VISIBLE_DEVICES=... rlmm rollout-server MODEL` on the GPUs that each server is to have, and "
            "name them in engine.urls"
        )


@contextmanager
def _model_folder(policy: TransformerPolicy, kept: Kept) -> Iterator[Path]:
    """Where servers find the model. A kept folder is written at the first start; a later one begins with the same
    weights, and takes those of then by the sync that follows it."""
    with tempfile.TemporaryDirectory() if kept is None else nullcontext(kept.name) as name:
        folder = Path(name)
        if not any(folder.iterdir()):
            with by_this_process():
                policy.save(folder)
        yield folder


def _transfer(config: VllmServerConfig, hosts: Sequence[Any], device: torch.device) -> Callable[[Any], None]:
    from rollouts.vllm_engine.broadcast import GroupTransfer
    from rollouts.vllm_engine.transfer import AdapterTransfer, FolderTransfer

    if config.transfer == "folder":
        way = FolderTransfer(hosts, Path(config.exchange or tempfile.gettempdir()))
    else:
        here = device if config.transfer == "nccl" else torch.device("cpu")
        way = GroupTransfer(hosts, config.trainer_host, config.transfer, here)
    return AdapterTransfer(way) if config.sync == "adapter" else way


def _token(config: VllmServerConfig) -> str:
    token = os.environ.get(config.token_env)
    if not token:
        raise ValueError(
            f"engine.urls names servers, and the environment variable {config.token_env} with their API key is not "
            "set; `rlmm rollout-server` reads it, too: set the same value for both"
        )
    return token


def _own_urls(urls: Sequence[str]) -> Sequence[str]:
    """This process's share: a server serves one process, since its weights and waves are of one rollout at a time."""
    rank, size = world()
    if len(urls) < size:
        raise ValueError(
            f"{size} training processes and {len(urls)} rollout server(s); start one for each process and list them in "
            "engine.urls"
        )
    return urls[rank::size]


def _served(config: VllmSizes, policy: TransformerPolicy, law: Law | None) -> dict[str, Any]:
    """How a vLLM serves the policy."""
    model = policy.base
    guided = law is not None and len(law.streams()) == STREAMS
    together = config.two_streams and guided
    return {
        "max_length": config.positions(policy.sizes.max_position_embeddings),
        "dtype": config.dtype or policy.precision,
        "max_rows": config.max_rows,
        "max_prompt_tokens": config.max_prompt_tokens,
        "kv_bytes": config.kv_megabytes << 20,
        "enforce_eager": config.enforce_eager,
        "overrides": served_overrides(policy.layout, model.config, type(model).__name__, together=together),
    }


ENGINES: dict[str, Callable[[Any, TransformerPolicy, Law | None, bool], Engine]] = {
    "torch": _torch,
    "vllm": _vllm,
    "vllm_server": _vllm_server,
}
