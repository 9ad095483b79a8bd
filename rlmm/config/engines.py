"""What a recipe may say of the engine that makes its rollouts."""

from collections import Counter
from ipaddress import ip_address
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rlmm.config.base import Strict


class TorchEngineConfig(Strict):
    """Sampling in the training process, from the weights that are trained."""

    kind: Literal["torch"] = "torch"
    max_rows: int = Field(512, ge=1)
    """Most decode rows (samples x streams) in one batch."""


class VllmSizes(Strict):
    """What one vLLM can hold."""

    max_rows: int = Field(256, ge=1)
    """Most rows (samples x streams) in one batch."""
    max_prompt_tokens: int = Field(8192, ge=1)
    """Most prefix tokens prefilled in one step."""
    max_length: int | None = Field(None, ge=1)
    """Positions of the longest prompt with its image; by default the checkpoint's. The keys and values of so many must
    fit kv_megabytes, and vLLM prefills them at once where it must."""
    kv_megabytes: int = Field(1024, ge=1)
    """Memory for keys and values. vLLM touches all of it."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What vLLM computes in and holds the weights in; None: the stage's precision. The gate on the mismatch of trainer
    and sampler says whether it does."""
    enforce_eager: bool = True
    """False: vLLM compiles the model when it starts, which takes a minute the first time, and on a GPU records CUDA
    graphs."""
    two_streams: bool = True
    """Draw a guided sample in one request that carries both streams, where the policy's layout has a null token."""

    @property
    def bases(self) -> int:
        """Copies of the weights on this machine that adapters are folded into."""
        return 0

    def positions(self, longest: int) -> int:
        """Of a request, of a checkpoint that has `longest`. Raises ValueError where more are asked for."""
        if self.max_length is not None and self.max_length > longest:
            raise ValueError(
                f"max_length {self.max_length} of the vllm engine is more than the checkpoint's {longest} positions; "
                "lower it, or leave it out"
            )
        return self.max_length or longest


class VllmEngineConfig(VllmSizes):
    """Stock vLLM inside the training process (one process)."""

    kind: Literal["vllm"] = "vllm"
    sleep: bool = False
    """Give the device's memory back between rollouts (vLLM's sleep mode; GPUs only)."""


class VllmServed(VllmSizes):
    """What a vLLM that runs as a server is started with, here or by hand."""

    tensor_parallel: int = Field(1, ge=1)
    """Devices of one server."""
    token_env: str = "RLMM_ROLLOUT_TOKEN"
    """The environment variable that holds the API key of servers that are started by hand (`urls`)."""


class VllmServerConfig(VllmServed):
    """Stock vLLM as servers: started here, each in a process of its own, or running elsewhere."""

    kind: Literal["vllm_server"] = "vllm_server"
    urls: tuple[Annotated[str, Field(pattern=r"^https?://")], ...] = ()
    """Servers started with `rlmm rollout-server`, which fixed their sizes then; those are not set here. With several
    training processes each takes its share of them."""
    replicas: int = Field(1, ge=1)
    """Servers that each training process starts where no urls are given. More than one without a GPU alone."""
    transfer: Literal["folder", "gloo", "nccl"] = "folder"
    """How weights reach the servers: files in `exchange`, or a process group of trainer and servers (nccl: between
    GPUs)."""
    sync: Literal["weights", "adapter"] = "weights"
    """What a sync sends. adapter, for a stage with LoRA: all weights once, then the adapter alone, which each server
    folds into a copy of the base that it keeps in main memory."""
    exchange: str | None = None
    """A folder that trainer and servers share. None: a temporary one, which does for servers on this machine."""
    trainer_host: str = "127.0.0.1"
    """This machine's address as the servers reach it, where a process group is made with them (gloo, nccl)."""
    start_seconds: float = Field(600, gt=0)
    """How long a server may take to start."""

    @model_validator(mode="after")
    def _one_source(self) -> "VllmServerConfig":
        if not self.urls and self._changed("token_env"):
            raise ValueError(
                "token_env names the key of servers that urls name, and servers that are started here make their own; "
                "leave it out, or name the servers in urls"
            )
        if self.urls and (here := self._changed("replicas", "start_seconds")):
            raise ValueError(
                f"{here}: of servers that are started here, and urls name servers that run already; leave out one or "
                "the other"
            )
        if self.urls and (fixed := self._changed(*VllmServed.model_fields.keys() - {"token_env"})):
            raise ValueError(
                f"{fixed}: settings of a server that is started (`rlmm rollout-server MODEL key=value`), and urls name "
                "servers that run already; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _each_once(self) -> "VllmServerConfig":
        seen = Counter(url.rstrip("/") for url in self.urls)
        if twice := [url for url, count in seen.items() if count > 1]:
            raise ValueError(f"urls names {twice[0]} {seen[twice[0]]} times, and a server draws one part; name it once")
        return self

    @model_validator(mode="after")
    def _weights_arrive(self) -> "VllmServerConfig":
        far = [url for url in self.urls if not _is_loopback(urlsplit(url).hostname or "")]
        if self.transfer == "folder":
            if self._changed("trainer_host"):
                raise ValueError(
                    "trainer_host is for a process group with the servers, and transfer: folder makes none; leave it "
                    "out, or set engine.transfer to nccl or gloo"
                )
            if far and self.exchange is None:
                raise ValueError(
                    f"{far[0]} would be sent weights in a temporary folder of this machine; set engine.exchange to a "
                    "folder that both reach, or engine.transfer to nccl or gloo"
                )
            return self
        if self.exchange is not None:
            raise ValueError(f"exchange is a folder, and transfer: {self.transfer} uses none; leave one of them out")
        if far and _is_loopback(self.trainer_host):
            raise ValueError(
                f"transfer: {self.transfer} has the servers connect to trainer_host, and {self.trainer_host} means "
                f"whatever machine asks; set engine.trainer_host to this machine's address as {far[0]} reaches it"
            )
        return self

    def _changed(self, *names: str) -> str:
        """Those of the settings that are not the default. By value: a resolved recipe that was printed or kept names
        every key."""
        fields = type(self).model_fields
        return ", ".join(sorted(name for name in names if getattr(self, name) != fields[name].default))

    @property
    def started(self) -> int:
        """Servers on this machine's account."""
        return 0 if self.urls else self.replicas

    @property
    def bases(self) -> int:
        return self.started * self.tensor_parallel * (self.sync == "adapter")


class RolloutServerConfig(VllmServed):
    """`key=value` of `rlmm rollout-server`. `dtype` None: the one that the model was saved in."""

    two_streams: bool = False
    """Serve the model that carries both streams of a guided sample. It computes both for a sample without guidance,
    too, and so doubles its cost; without it a server takes either kind, and guided samples are drawn in pairs."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_the_runs(cls, data: Any) -> Any:
        runs = VllmServerConfig.model_fields.keys() - cls.model_fields.keys()
        if isinstance(data, dict) and (found := sorted(runs & data.keys())):
            raise ValueError(
                f"{', '.join(found)}: of the training run, which says it beside the server's url (engine.{found[0]} in "
                "the recipe); leave it out here"
            )
        return data


def _is_loopback(host: str) -> bool:
    """Whether a host's name or address means the machine that asks, or no machine (0.0.0.0)."""
    try:
        found = ip_address(host)
    except ValueError:
        return host.lower() in ("localhost", "localhost.localdomain") or host.lower().endswith(".localhost")
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_loopback or found.is_unspecified


def check_sync(engine: "EngineConfig", *, lora: bool) -> None:
    """Raises ValueError where adapters are to be sent and a stage has none."""
    if isinstance(engine, VllmServerConfig) and engine.sync == "adapter" and not lora:
        raise ValueError(
            "engine.sync: adapter sends the servers a LoRA adapter, and this stage trains none; give the stage a lora "
            "section, or leave engine.sync out"
        )


EngineConfig = Annotated[TorchEngineConfig | VllmEngineConfig | VllmServerConfig, Field(discriminator="kind")]
