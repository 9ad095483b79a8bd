"""The worker of the device that vLLM finds: vLLM's `worker_cls`, by a name that only vLLM's own processes look up."""

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from rollouts.vllm_engine.steps import StepsWorker as DeviceWorker
elif current_platform.is_xpu():
    from vllm.v1.worker.xpu_worker import XPUWorker as DeviceWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as DeviceWorker

__all__ = ["DeviceWorker"]
