"""From a folder or a hub id to a policy: which family reads it, and what that family makes of it.

A folder that a stage or `rlmm export` wrote has layout.json and codec/, and names its family there. A published
checkpoint has neither: its family works them out.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from rewards.checkpoints import load_model
from rewards.functions import load_function
from rlmm.codecs import Codec, load_codec
from rlmm.config.base import nearest
from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.families import (
    blip3o,
    chameleon,
    emu3,
    glm_image,
    janus,
    llama,
    llamagen,
    lumina_dimoo,
    mmada,
    show_o,
    simplear,
)
from rlmm.policies.families.base import SETTINGS, Checkpoint, Family
from rlmm.policies.layout_io import LAYOUT_FILE, load_layout
from rlmm.policies.models import CLASSES
from rlmm.policies.models.showo import Showo
from rlmm.policies.saving import by_this_process
from rlmm.policies.spelling import Spelling
from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Layout

SHIPPED = (
    llama.FAMILY, emu3.FAMILY, chameleon.FAMILY, chameleon.LUMINA, janus.FAMILY,
    llamagen.FAMILY, llamagen.TEXT, glm_image.FAMILY, glm_image.EDIT, simplear.FAMILY, blip3o.FAMILY,
    mmada.FAMILY, lumina_dimoo.FAMILY, show_o.FAMILY,
)  # fmt: skip
FAMILIES: Mapping[str, Family] = {family.name: family for family in SHIPPED}
"""Name -> family. Another one needs no entry: a recipe names it as `policy.family: my_family.py:family`."""


def find_family(name: str) -> Family:
    """A shipped family, or what the function `file.py:NAME` (or `module:NAME`) returns. Raises ValueError."""
    if name in FAMILIES:
        return FAMILIES[name]
    if ":" not in name:
        raise ValueError(f"there is no family {name!r}.{nearest(name, list(FAMILIES))}")
    made = load_function(name, "checkpoint family")()
    if not isinstance(made, Family):
        raise ValueError(f"{name} returned a {type(made).__name__}; return a rlmm.policies.families.base.Family")
    return made


def load_policy(source: Path | str, options: CheckpointPolicy | None = None) -> TransformerPolicy:
    """The policy in a folder or hub id. `options`: what a recipe says of a published checkpoint.

    Raises ValueError naming the source where it cannot be read.
    """
    checkpoint = _checkpoint(source, options)
    layout = layout_of(source, options)
    family = find_family(layout.family)
    named = None if options is None else options.dtype or (None if own_folder(source) else "float32")
    dtype = "auto" if named is None else getattr(torch, named)
    kind = _model_class(family, checkpoint.config)
    known: dict[str, Any] = {"config": checkpoint.config} if kind in (*CLASSES.values(), AutoModelForCausalLM) else {}
    if family.mend is not None:
        known["ignore_mismatched_sizes"] = True
    try:
        # Show-o was published as a pickle alone, of which transformers reads tensors and nothing else.
        load: Callable[..., Any] = kind.from_pretrained if kind is Showo else partial(load_model, kind)
        model, report = load(checkpoint.source, dtype=dtype, output_loading_info=True, **known)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{source} is not a readable checkpoint ({error}); give a complete model folder or a hub id"
        ) from error
    if family.mend is not None:
        family.mend(cast(PreTrainedModel, model), checkpoint, sorted(name for name, *_ in report["mismatched_keys"]))
    policy = family.policy(cast(PreTrainedModel, model), cast(PreTrainedTokenizerBase, checkpoint.tokenizer), layout)
    idle = tuple(part for part in policy.frozen_parts if part not in policy.read_parts)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(idle))
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of the model's weights, the first of them {missing[0]!r}, and transformers "
            "would fill them with random numbers; give the complete checkpoint"
        )
    return policy


def layout_of(source: Path | str, options: CheckpointPolicy | None = None) -> Layout:
    """What layout.json says, else what the checkpoint's family works out. Raises ValueError as `load_policy` does."""
    if own_folder(source) and not (options is not None and options.tiny):
        layout = load_layout(Path(source))
        _refuse_settings(options, layout.family)
        return layout
    checkpoint = _checkpoint(source, options)
    name = checkpoint.options.family
    family = _by_class(checkpoint.config) if name is None else _named(name, checkpoint)
    for setting in sorted(SETTINGS - family.settings):
        if getattr(checkpoint.options, setting) is not None:
            raise ValueError(f"policy.{setting}: family {family.name!r} has no use for it; leave it out")
    return family.layout(checkpoint)


def _refuse_settings(options: CheckpointPolicy | None, family: str) -> None:
    """Of a folder that knows its own layout."""
    for setting in sorted(SETTINGS):
        if options is not None and getattr(options, setting) is not None:
            raise ValueError(
                f"policy.{setting}: {options.path} has a layout.json, which says it already; leave the setting out"
            )
    if options is not None and options.family not in (None, family):
        raise ValueError(f"policy.family {options.family!r}: {options.path} is of family {family!r}; leave it out")


def checkpoint_codec(options: CheckpointPolicy) -> Codec:
    """The image tokenizer of a recipe's checkpoint. Raises ValueError where there is none, or where its family says
    otherwise than it does what it draws from."""
    if own_folder(options.path) and not options.tiny:
        return load_codec(Path(options.path) / "codec")
    checkpoint = _checkpoint(options.path, options)
    family = find_family(layout_of(options.path, options).family)
    codec = family.codec(checkpoint).eval()
    if codec.reads_hidden != family.reads_hidden:
        raise ValueError(
            f"the image tokenizer of family {family.name!r} has reads_hidden {codec.reads_hidden} and the family says "
            f"{family.reads_hidden}, by which memory is planned; set Family.reads_hidden"
        )
    return codec


def load_config(source: Path | str, options: CheckpointPolicy | None = None) -> PretrainedConfig:
    """The model's configuration. Raises ValueError as `load_policy` does."""
    return _checkpoint(source, options).config


def load_spelling(source: Path | str, options: CheckpointPolicy | None = None) -> Spelling:
    """How the policy in a folder spells prompts, without its weights. Raises ValueError as `load_policy` does."""
    checkpoint, layout = _checkpoint(source, options), layout_of(source, options)
    return Spelling(checkpoint.tokenizer, layout, checkpoint.config.get_text_config().max_position_embeddings)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of a configuration, without weights; on the meta device, without memory."""
    with torch.device("meta"):
        made = _model_class(_by_class(config), config)
        return made.from_config(config) if made is AutoModelForCausalLM else made(config)


def outline(options: CheckpointPolicy) -> TransformerPolicy:
    """The policy of a recipe's checkpoint with none of its weights read: for its shapes, on the current device.
    Raises ValueError as `load_policy` does."""
    with torch.device("cpu"):  # what reading it makes (a tiny instance, a layout) is real whatever the device
        checkpoint, layout = _checkpoint(options.path, options), layout_of(options.path, options)
    kind = _model_class(find_family(layout.family), checkpoint.config)
    made = kind.from_config(checkpoint.config) if kind is AutoModelForCausalLM else kind(checkpoint.config)
    named = options.dtype or (None if own_folder(options.path) else "float32")
    stated = checkpoint.config.dtype if named is None else getattr(torch, named)
    model = made if stated is None else made.to(stated)
    return find_family(layout.family).policy(
        cast(PreTrainedModel, model), cast(PreTrainedTokenizerBase, checkpoint.tokenizer), layout
    )


def model_class(source: Path | str) -> tuple[str, str]:
    """What loads a checkpoint's model: the package to import from, and the class."""
    config = load_config(source)
    name = _model_class(_by_class(config), config).__name__
    return CLASSES[name].__module__ if name in CLASSES else "transformers", name


def is_masked(options: CheckpointPolicy) -> bool:
    """Whether a checkpoint is of a masked family: by its name, else by the files of a folder. Of a hub id without a
    name nothing is known before it is loaded: False. Raises ValueError as `find_family` does."""
    if own_folder(options.path) and not options.tiny:
        return load_layout(Path(options.path)).mask is not None
    if options.family is not None:
        return find_family(options.family).masked
    return Path(options.path).is_dir() and _by_class(load_config(options.path)).masked


def not_here(options: CheckpointPolicy) -> str | None:
    """Why a recipe's checkpoint is not at hand, and what would bring it; None where it is, readable or not."""
    path = Path(options.path)
    if options.tiny or path.exists():
        return None
    if "stages" in path.parts:
        run = Path(*path.parts[: path.parts.index("stages")])
        return f"there is no such folder; the run in {run} makes it"
    try:
        cached_file(options.path, CONFIG_NAME)
    except OSError as error:
        reason = str(error).splitlines()[0]
        return f"there is no such folder, and as a hub id it cannot be read ({reason}); make the folder, or download it"
    return None


def tiny_folder(options: CheckpointPolicy) -> Path:
    """A random instance in place of a published checkpoint, made once a process; the same one in every process."""
    assert options.family is not None, "the config lets no tiny policy be without"
    return _made(options.family, options.image_size or (48, 48))


@cache
def _made(name: str, image_size: tuple[int, int]) -> Path:
    make = find_family(name).tiny
    if make is None:
        raise ValueError(f"family {name!r} has no tiny instance; give it one, or a checkpoint in policy.path")
    folder = Path(tempfile.mkdtemp(prefix=f"rlmm-tiny-{name.rpartition(':')[2]}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with by_this_process():
        make(folder, image_size)
    return folder


def own_folder(source: Path | str) -> bool:
    """Whether a stage or `rlmm export` wrote it."""
    return (Path(source) / LAYOUT_FILE).is_file()


def _checkpoint(source: Path | str, options: CheckpointPolicy | None) -> Checkpoint:
    if options is not None and options.tiny:
        source = tiny_folder(options)
    return Checkpoint(str(source), options or CheckpointPolicy(path=str(source)))


def _named(name: str, checkpoint: Checkpoint) -> Family:
    family, classes = find_family(name), checkpoint.config.architectures or []
    if family.architectures and not set(classes) & {*family.architectures, *family.known_as}:
        raise ValueError(
            f"policy.family {name!r} reads {', '.join(family.architectures)}, and {checkpoint.source} is a "
            f"{', '.join(classes) or 'model of unknown class'}; leave family out, or name the right one"
        )
    return family


def _by_class(config: PretrainedConfig) -> Family:
    names, unnamed = set(config.architectures or ()), [family for family in FAMILIES.values() if not family.named]
    fitting = (family for family in unnamed if names & {*family.architectures, *family.known_as})
    return next(fitting, llama.FAMILY)


def _model_class(family: Family, config: PretrainedConfig) -> Any:
    """The class that the checkpoint was saved from, where it is one of the family's."""
    names = [family.known_as.get(name, name) for name in config.architectures or ()]
    known = [name for name in names if name in family.architectures]
    if not known:
        return AutoModelForCausalLM
    return CLASSES[known[0]] if known[0] in CLASSES else getattr(transformers, known[0])
