"""What a policy stage leaves behind, and the export of it."""

import shutil
from pathlib import Path

from peft import PeftModel

from rlmm.codecs import Codec, save_codec
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.context import StageContext, published_base
from rlmm.train.processes import world


def save_result(context: StageContext, policy: TransformerPolicy, codec: Codec) -> None:
    """model/: the full model, tokenizer, layout and codec; adapter/: the adapter alone, where the stage trained one."""
    rank, _ = world()
    with policy.whole():
        if rank == 0:
            write_model(policy, codec, context.model_folder)
            if isinstance(policy.model, PeftModel):
                policy.save_adapter(context.folder / "adapter", base=published_base(context) or "../base")


def write_model(policy: TransformerPolicy, codec: Codec, folder: Path) -> None:
    """A complete model folder, renamed in when whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.save(partial)
    save_codec(codec, partial / "codec")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
