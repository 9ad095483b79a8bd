"""Published models as all of the project loads them: no code of theirs is run, and weights are safetensors alone."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


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


def read_tensors(file: Path, plain: Sequence[type] = ()) -> "dict[str, Tensor]":
    """The tensors of a published pickle, by name; no code of it is run. `plain`: classes of settings that it may hold
    beside them. Raises ValueError where it holds none, or more than tensors and plain settings."""
    import torch

    try:
        with torch.serialization.safe_globals(list(plain)):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} cannot be read as tensors ({error}); give a published checkpoint") from error
    if isinstance(found, Mapping):
        found = next((found[key] for key in ("model", "module", "state_dict") if key in found), found)
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    raise ValueError(f"{file} holds a {type(found).__name__} and no weights by name; give a published checkpoint")


def misfits(model: Any, weights: "Mapping[str, Tensor]") -> list[str]:
    """Names of weights that only one of the two has, or both in other shapes, sorted."""
    own = model.state_dict()
    return sorted(n for n in {**own, **weights} if n not in own or n not in weights or own[n].shape != weights[n].shape)
