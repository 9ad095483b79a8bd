"""The memory plan as `rlmm check` shows it."""

from collections.abc import Sequence

from rich.table import Table

from rlmm.memory import MemoryPlan, readable

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "reference",
    "engine",
    "codec",
    "exchange",
    "working",
    "sampling",
    "pictures",
)


def plan_table(plans: Sequence[MemoryPlan], processes: int) -> Table:
    """A column a policy stage, a row a part; parts that few machines have only where there are any."""
    parts = PARTS
    for some in ("rewards", "libraries"):
        parts += (some,) * any(getattr(plan, some) for plan in plans)
    parts += ("total",)
    parts += ("offloaded",) * any(plan.offloaded for plan in plans)
    table = Table(title="Memory plan (estimate)" + ", of each process" * (processes > 1))
    for column in ("held", *(plan.stage for plan in plans)):
        table.add_column(column, justify="left" if column == "held" else "right")
    for part in parts:
        table.add_row(part, *[readable(getattr(plan, part)) for plan in plans])
    return table
