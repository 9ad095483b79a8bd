"""Files that each of several processes writes for itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def by_this_process() -> Iterator[None]:
    """Within, `save_pretrained` of a transformers model writes in whichever process calls it; by itself it writes in
    the first one of a process group alone, and leaves the others an empty folder."""
    PreTrainedModel.should_save_on_this_rank = lambda self, is_main_process: is_main_process  # pyrefly: ignore
    try:
        yield
    finally:
        del PreTrainedModel.should_save_on_this_rank  # what it inherits is back
