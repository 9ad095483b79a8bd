"""Prompts that a policy cannot take are left out before a stage starts, and counted."""

from collections import Counter
from collections.abc import Sequence

from rlmm.config.data import MAX_EXCLUDED_SHARE, Data, RowsData
from rlmm.data import Dataset
from rlmm.data.base import Subset
from rlmm.policies.spelling import Spelling, UnusablePrompt


def usable_rows(data: Dataset, spellings: Sequence[Spelling], config: Data) -> Dataset:
    """The rows whose prompt every one of `spellings` can take; `data` itself where that is all of them.

    What remains is a function of rows and spellings alone. Raises ValueError, naming the first prompt left out, for
    more exclusions than data.max_excluded_share allows, or nothing left.
    """
    faults = {index: fault for index in range(len(data)) if (fault := _fault(data, index, spellings)) is not None}
    if not faults:
        return data
    kept = [index for index in range(len(data)) if index not in faults]
    rows = Subset(data, kept, data.excluded + Counter(fault.reason for fault in faults.values()))
    _judge(rows, next(iter(faults.values())), config)
    return rows


def _fault(data: Dataset, index: int, spellings: Sequence[Spelling]) -> UnusablePrompt | None:
    asked = data.outline(index)
    return next((fault for one in spellings if (fault := one.fault(asked.prompt, asked.sources)) is not None), None)


def _judge(rows: Subset, first: UnusablePrompt, config: Data) -> None:
    own = isinstance(config, RowsData)
    share = config.max_excluded_share if own else MAX_EXCLUDED_SHARE
    out = rows.excluded.total()
    if out <= share * rows.rows_read and len(rows):
        return
    limit = f"data.max_excluded_share {share}" if own else f"a share of {share}"
    why = f"That is more than {limit}" if len(rows) else "No row is left"
    raise ValueError(
        f"{out} of {rows.rows_read} rows excluded ({reasons(rows.excluded)}). The first prompt that the policy cannot "
        f"take: {first}. {why}: mend the rows" + (" or raise it" if own and len(rows) else "")
    )


def reasons(excluded: Counter[str]) -> str:
    """The counts by reason, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in excluded.most_common())
