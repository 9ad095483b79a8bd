"""What a recipe may say of the engine that makes its rollouts."""

from typing import Annotated, Literal

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


class VllmEngineConfig(VllmSizes):
    """Stock vLLM inside the training process (one process)."""

    kind: Literal["vllm"] = "vllm"
    sleep: bool = False
    """Give the device's memory back between rollouts (vLLM's sleep mode; GPUs only)."""


OF_SERVERS = (*VllmSizes.model_fields, "start_seconds")
"""Settings that a server takes when it starts."""


class VllmServerConfig(VllmSizes):
    """Stock vLLM as servers: started here, each in a process of its own, or running elsewhere."""

    kind: Literal["vllm_server"] = "vllm_server"
    urls: tuple[Annotated[str, Field(pattern=r"^https?://")], ...] = ()
    """Servers started with `rlmm rollout-server`, which fixed their sizes then; those are not set here. With several
    training processes each takes its share of them."""
    replicas: int = Field(1, ge=1)
    """Servers that each training process starts where no urls are given."""
    tensor_parallel: int = Field(1, ge=1)
    """Devices of one server that is started here."""
    transfer: Literal["folder", "gloo", "nccl"] = "folder"
    """How full weights reach the servers: files in `exchange`, or a process group of trainer and servers (nccl: between
    GPUs)."""
    exchange: str | None = None
    """A folder that trainer and servers share. None: a temporary one, which does for servers on this machine."""
    trainer_host: str = "127.0.0.1"
    """This machine's address as the servers reach it, where a process group is made with them."""
    token_env: str = "RLMM_ROLLOUT_TOKEN"
    """The environment variable that holds the API key of the servers in `urls`."""
    start_seconds: float = Field(600, gt=0)
    """How long a server may take to start."""

    @model_validator(mode="after")
    def _one_source(self) -> "VllmServerConfig":
        if self.urls and (self.replicas, self.tensor_parallel) != (1, 1):
            raise ValueError(
                "urls name servers that run already; replicas and tensor_parallel are of servers that are started here"
            )
        # By value: a resolved recipe that was printed or kept names every key.
        defaults = type(self).model_fields
        fixed = [name for name in OF_SERVERS if getattr(self, name) != defaults[name].default]
        if self.urls and fixed:
            raise ValueError(
                f"{', '.join(fixed)}: settings of a server that is started (`rlmm rollout-server MODEL key=value`), "
                "and urls name servers that run already; leave them out"
            )
        if self.exchange is not None and self.transfer != "folder":
            raise ValueError(f"exchange is a folder, and transfer: {self.transfer} uses none; leave one of them out")
        return self

    @property
    def started(self) -> int:
        """Servers on this machine's account."""
        return 0 if self.urls else self.replicas


EngineConfig = Annotated[TorchEngineConfig | VllmEngineConfig | VllmServerConfig, Field(discriminator="kind")]
