"""GRPO with rollouts drawn a step ahead, by the torch engine and by vLLM in this process and as a server."""

import json
import tempfile
from pathlib import Path

from tests.integration.vllm_program import stages


def main() -> None:
    sizes = {"max_rows": 8, "kv_megabytes": 32}
    engines = [{"kind": "torch"}, {"kind": "vllm", **sizes}, {"kind": "vllm_server", **sizes}]
    objective = {"name": "grpo", "mismatch": {"kind": "truncate"}}
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"rows": stages(Path(folder), engines, max_staleness=1, objective=objective)}))


if __name__ == "__main__":
    main()
