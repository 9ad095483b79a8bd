"""What vLLM holds of a policy in this process: `DTYPE`. Prints what was planned for it and what is held, in bytes."""

import ctypes
import gc
import sys
import tempfile
from pathlib import Path

from rlmm.config.recipe import read_recipe
from rlmm.memory import memory_plans
from rlmm.policies.families import llama
from rlmm.train.engines import served_overrides
from rollouts.vllm_engine.local import LocalHost

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
HEAD = 64


def resident() -> int:
    """Bytes, once what was let go of is given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def served(dtype: str, hidden: int, layers: int) -> tuple[LocalHost, int, int]:
    """An engine, what was planned for its weights, and what it holds."""
    sizes = f"hidden_size: {hidden}, num_layers: {layers}, num_heads: {hidden // HEAD}, intermediate_size: {3 * hidden}"
    engine = f"stages.grpo.engine={{kind: vllm, kv_megabytes: 4, dtype: {dtype}}}"
    recipe = read_recipe(TINY, [f"policy={{kind: new, {sizes}}}", engine])
    assert recipe.codec is not None and recipe.policy.kind == "new"
    policy = llama.build(recipe.policy, num_codes=recipe.codec.num_codes, grid=recipe.codec.grid, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        overrides = served_overrides(policy.layout, policy.base.config, type(policy.base).__name__, together=False)
        del policy
        before = resident()
        made = LocalHost(
            Path(folder), max_length=64, dtype=dtype, max_rows=8, max_prompt_tokens=64, kv_bytes=4 << 20,
            overrides=overrides,
        )  # fmt: skip
    return made, memory_plans(recipe)[-1].engine, resident() - before


if __name__ == "__main__":
    served(sys.argv[1], 64, 1)[0].close()  # what vLLM's first engine loads of libraries is not the second one's
    _, planned, held = served(sys.argv[1], 768, 6)
    print(planned, held)
