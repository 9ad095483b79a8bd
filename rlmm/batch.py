"""The batch equation: what a step is made of, printed before anything runs."""

from collections.abc import Collection

from rlmm.config.recipe import Recipe
from rlmm.config.stages import CodecStage, DpoStage, GrpoStage, SftStage


def batch_equations(recipe: Recipe, processes: int = 1, done: Collection[str] = ()) -> list[str]:
    """One line a training stage that is not `done`. Raises ValueError where one cannot be shared out evenly among the
    processes."""
    waiting = {name: stage for name, stage in recipe.stages.items() if name not in done}
    return [f"{name}: {line}" for name, stage in waiting.items() if (line := _equation(stage, processes)) is not None]


def _equation(stage: object, processes: int) -> str | None:
    if isinstance(stage, GrpoStage):
        updates, micro = stage.objective.updates_per_rollout, stage.micro_batch_size
        accumulation = _accumulation(stage.rollouts // updates, micro, processes)
        return (
            f"{stage.prompts_per_step} prompts x {stage.samples_per_prompt} samples = {stage.rollouts} rollouts; "
            f"{updates} update(s) a rollout, each {processes} process(es) x {accumulation} micro-batch(es) x "
            f"{micro} rows; "
            f"{stage.steps} updates = {-(-stage.steps // updates) * stage.rollouts} images"
        )
    if isinstance(stage, SftStage | DpoStage):
        what = "rows" if isinstance(stage, SftStage) else "images" if stage.loss == "kto" else "pairs"
        accumulation = _accumulation(stage.batch_size, stage.micro_batch_size, processes)
        return (
            f"{processes} process(es) x {accumulation} micro-batch(es) x {stage.micro_batch_size} {what} = "
            f"{stage.batch_size} {what} a step; {stage.steps} steps"
        )
    if isinstance(stage, CodecStage):
        if stage.batch_size % processes:
            raise ValueError(
                f"a codec's batch_size {stage.batch_size} is no multiple of {processes} processes; change one"
            )
        return f"{processes} process(es) x {stage.batch_size // processes} images a step; {stage.steps} steps"
    return None


def _accumulation(rows: int, micro_batch_size: int, processes: int) -> int:
    if rows % (micro_batch_size * processes):
        raise ValueError(
            f"{rows} rows an update are no multiple of micro_batch_size {micro_batch_size} x {processes} process(es); "
            "change one of them or the number of processes"
        )
    return rows // micro_batch_size // processes
