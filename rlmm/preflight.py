"""What stages ask of a checkpoint that only its layout tells: said before the first of them runs."""

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe
from rlmm.config.sampling import Sampled
from rlmm.config.stages import GrpoStage, PairsStage, Stage
from rlmm.policies.families.loading import layout_of
from rollouts.contract import Layout
from rollouts.unmasking import check_steps


def check_layout(recipe: Recipe) -> None:
    """Raises ValueError where a stage reveals an image of a masked checkpoint in steps that its grid has not, and as
    `layout_of` does. Of a new policy the recipe itself tells it."""
    if not isinstance(recipe.policy, CheckpointPolicy):
        return
    layout = layout_of(recipe.policy.path, recipe.policy)
    for name, stage in recipe.stages.items():
        try:
            _check(stage, layout)
        except ValueError as error:
            raise ValueError(f"stage {name!r}: {error}") from error


def _check(stage: Stage, layout: Layout) -> None:
    sampled = stage.sampling if isinstance(stage, GrpoStage | PairsStage) else stage
    if isinstance(sampled, Sampled) and sampled.unmasking is not None:
        check_steps(sampled.unmasking.record(), len(layout.grid.decided()))
