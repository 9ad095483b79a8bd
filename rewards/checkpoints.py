"""Published models as all of the project loads them: no code of theirs is run, and weights are safetensors alone."""

from pathlib import Path
from typing import Any


def load_model(kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained(source, **options)` of a transformers model that runs nothing the source brings: it may
    have no code of its own, and its weights are no pickles.

    Raises what that raises; OSError with the way on for a folder whose weights are pickles alone.
    """
    try:
        return kind.from_pretrained(source, trust_remote_code=False, use_safetensors=True, **options)
    except OSError as error:
        folder = Path(source)
        pickles = sorted(path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{suffix}"))
        if not pickles or any(folder.glob("*.safetensors")):
            raise
        raise OSError(
            f"its weights are a pickle ({pickles[0]}), which may run code when it is read, and only safetensors are "
            "read: take a revision that has model.safetensors, or load it where that does no harm and write it anew "
            "with save_pretrained"
        ) from error
