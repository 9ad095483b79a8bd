"""Policies, requests and supervised rows of the size that a memory plan is made for."""

from array import array
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlmm.config.policy import NewPolicy
from rlmm.config.recipe import read_recipe
from rlmm.config.stages import PolicyStage
from rlmm.dry_run import dry_run
from rlmm.memory import Make
from rlmm.planned_data import ASSUMED
from rlmm.planned_rows import Row, Rows
from rlmm.planned_update import law_of, update_of
from rlmm.policies.families import llama
from rlmm.policies.layout_io import Supervised
from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Request

RECIPES = Path(__file__).parents[1] / "recipes"
CODEC = ("codec.levels=[8,8,8,5]", "codec.patch=4", "codec.image_size=[32,32]")


def sizes(hidden: int = 64, intermediate: int = 128, family: str = "causal", attention: str = "full") -> str:
    masked = f"family: masked, prompt_attention: {attention}, " if family == "masked" else ""
    return (
        f"policy={{kind: new, {masked}hidden_size: {hidden}, num_layers: 2, num_heads: 2, "
        f"intermediate_size: {intermediate}}}"
    )


@dataclass(frozen=True)
class Planned:
    """A stage, a policy for it, and what stands before its images."""

    stage: PolicyStage
    make: Make
    policy: TransformerPolicy
    rows: Rows

    @property
    def length(self) -> int:
        """Of a sequence."""
        return self.rows.own.length

    @property
    def passing(self) -> int:
        """Bytes that an update is planned to hold beside weights and the optimizer's state."""
        update = update_of(self.stage, self.policy.layout, self.rows, 1)
        return dry_run(self.make, law_of(self.stage, self.policy.layout), update).passing

    def requests(self, prompts: int, samples: int, names: tuple[str, ...], edits: bool) -> list[Request]:
        """Prompts as long as planned, but one, so that rows are padded."""
        layout = self.policy.layout
        sources = [(layout.image[0],) * layout.grid.length] * edits
        room = self.length - layout.grid.length - len(layout.prefix((), sources))
        made = []
        for place in range(prompts):
            prefix = layout.prefix((7,) * (room - (place == 1)), sources)
            seeds = tuple(range(place * samples, (place + 1) * samples))
            made.append(Request(str(place), dict.fromkeys(names, prefix), seeds, tuple(map(str, seeds))))
        return made

    def row(self, number: int) -> Supervised:
        layout = self.policy.layout
        room = self.length - layout.grid.length - len(layout.prefix(()))
        return Supervised((7,) * (room - (number % 5 == 1)), array("i", [number % 7] * len(layout.grid.decided())))


def planned(recipe: str, stage: str, *overrides: str) -> Planned:
    """Of a recipe's stage; the whole head is trained, here as there."""
    made = read_recipe(RECIPES / recipe, [*CODEC, *overrides])
    assert isinstance(made.policy, NewPolicy) and made.codec is not None
    make = partial(llama.build, made.policy, num_codes=made.codec.num_codes, grid=made.codec.grid, seed=0)
    found, policy = made.stages[stage], make()
    assert isinstance(found, PolicyStage)
    edits = "source_scale" in " ".join(overrides)
    length = ASSUMED + (1 + edits) * policy.layout.grid.length
    return Planned(found, make, policy, Rows(Row(length, ASSUMED)))
