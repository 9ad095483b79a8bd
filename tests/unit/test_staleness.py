"""Rollouts drawn ahead: what is refused, what stands still, and how long a step takes on a clock of its own."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlmm.config.policy import Lora
from rlmm.config.recipe import RecipeError, read_recipe
from rlmm.policies.head_rows import ROWS
from rlmm.policies.still import Still
from rlmm.train import ahead
from rlmm.train.ahead import Ahead, Drawn
from rlmm.train.experience import Timed
from rlmm.train.gates import Mismatch
from rollouts.fingerprint import weights_fingerprint
from tests.exact.enumerable import make_policy

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
TRUNCATED = "stages.grpo.objective.mismatch={kind: truncate}"
RESCALED = ("stages.grpo.sampling.guidance=rescaled", "stages.grpo.gates.off_policy=allow")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([], "would take samples of older weights for its own; set objective.mismatch"),
        (["stages.grpo.objective.mismatch={kind: reject}"], "kind reject leaves rows out and weighs none"),
        ([TRUNCATED, "stages.grpo.objective.kl.importance_weighted=true"], "kl.importance_weighted weighs by the"),
        ([TRUNCATED, *RESCALED], "with guidance rescaled the loss is of another law"),
        ([TRUNCATED, "stages.grpo.resample_flat=1"], "resample_flat draws again"),
        ([TRUNCATED, "stages.grpo.score_chunk=1"], "score_chunk is for rollouts"),
        ([TRUNCATED, "stages.grpo.deepspeed=zero1.json"], "which DeepSpeed may hold in parts"),
        ([TRUNCATED, "stages.grpo.engine={kind: vllm, sleep: true}"], "engine.sleep gives the engine's memory back"),
    ],
)
def test_what_cannot_be_stale_is_refused_with_the_reason(settings: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=rf"stage 'grpo' has max_staleness 1, and .*{reason}"):
        read_recipe(TINY, ["stages.grpo.max_staleness=1", *settings])
    read_recipe(TINY, ["stages.grpo.max_staleness=1", TRUNCATED, "stages.grpo.engine={kind: vllm}"])


def test_a_rollout_is_one_step_stale_at_most() -> None:
    with pytest.raises(RecipeError, match="max_staleness"):
        read_recipe(TINY, ["stages.grpo.max_staleness=2", TRUNCATED])


@pytest.mark.parametrize("trained", ["adapter", "all weights", "image rows"])
def test_a_copy_stands_still_until_it_takes_the_weights_again(trained: str) -> None:
    live = make_policy()
    if trained == "adapter":
        live.add_lora(Lora(rank=2, alpha=2), seed=0)
    elif trained == "image rows":
        live.train_image_rows()
    still = Still(live)
    changing = [p for p in live.model.parameters() if p.requires_grad]
    before = weights_fingerprint(live.named_weights())
    assert weights_fingerprint(still.policy.named_weights()) == before
    with torch.no_grad():
        for parameter in changing:
            parameter += 0.1
    after = weights_fingerprint(live.named_weights())
    assert weights_fingerprint(still.policy.named_weights()) == before != after
    still.take()
    assert weights_fingerprint(still.policy.named_weights()) == after
    names = [name for name, p in still.policy.model.named_parameters() if p.requires_grad or name.endswith(ROWS)]
    assert not names, "what is trained alone has no place in the copy"
    own = {p.data_ptr() for p in still.policy.model.parameters()}
    shared = [p.data_ptr() in own for p in live.model.parameters()]
    # The head whose rows are trained is held whole, and the parameter of its rows is not there.
    assert not any(p.data_ptr() in own for p in changing)
    assert sum(shared) == {"all weights": 0}.get(trained, len(shared) - len(changing) - (trained == "image rows"))


class Later(Future[Any]):
    """What is there when the clock of the one who waits comes to `ends`."""

    def __init__(self, clock: "Clock", ends: float, value: Any) -> None:
        super().__init__()
        self.clock, self.ends, self.value = clock, ends, value

    def result(self, timeout: float | None = None) -> Any:
        self.clock.now = max(self.clock.now, self.ends)
        return self.value


class Clock(Executor):
    """The trainer's time, and a sampler that takes `rollout_s` for a rollout."""

    def __init__(self, rollout_s: float) -> None:
        self.now, self.free, self.rollout_s = 0.0, 0.0, rollout_s

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Later:
        self.free = max(self.free, self.now) + self.rollout_s
        return Later(self, self.free, fn(*args, **kwargs))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock, int], Ahead]:
    """What draws ahead, on a clock, with samples that say nothing but which weights drew them."""
    synced: list[int] = []

    def sync(policy: Any, engine: Any, version: int) -> str:
        synced.append(version)
        return str(version)

    def drawn(self: Ahead, rollout: int, weights: str, finished: Any) -> Drawn:
        made: Any = SimpleNamespace(weights_version=synced[-1])
        return Drawn(rollout, weights, made, [], Mismatch(0.0, 1, 0.0))

    monkeypatch.setattr(ahead, "synced", sync)
    monkeypatch.setattr(ahead, "gate_settings", lambda context: {})
    monkeypatch.setattr(Ahead, "_drawn", drawn)

    def make(clock: Clock, steps: int) -> Ahead:
        stage = read_recipe(TINY, ["stages.grpo.max_staleness=1", TRUNCATED]).stages["grpo"]
        context: Any = SimpleNamespace(config=stage.model_copy(update={"steps": 2 * steps}), folder=Path("none"))
        still: Any = SimpleNamespace(take=lambda: None, live=None)
        roller: Any = SimpleNamespace(engine=None)
        return Ahead(context, roller, still, lambda: clock)

    return make


@pytest.mark.parametrize(
    ("rollout_s", "judge_s", "update_s"),
    [(8.0, 8.0, 1.0), (8.0, 1.0, 1.0), (1.0, 8.0, 1.0), (4.0, 0.0, 4.0), (0.0, 5.0, 2.0)],
)
def test_a_step_takes_the_longer_of_drawing_and_all_the_rest(
    taken: Callable[[Clock, int], Ahead], rollout_s: float, judge_s: float, update_s: float
) -> None:
    clock, steps = Clock(rollout_s), 20
    draws = taken(clock, steps)
    for rollout in range(steps):
        drawn, figures = draws.take(rollout, Timed())
        assert (drawn.rollout, drawn.staleness, figures["staleness"]) == (rollout, min(rollout, 1), min(rollout, 1))
        clock.now += judge_s + update_s
    assert draws.under_way is None, "nothing is drawn beyond the last step"
    rest = judge_s + update_s
    assert clock.now == pytest.approx(rollout_s + (steps - 1) * max(rollout_s, rest) + rest)


def test_a_rollout_of_older_weights_is_not_trained_on(taken: Callable[[Clock, int], Ahead]) -> None:
    draws = taken(Clock(1.0), 5)
    draws.take(0, Timed())
    with pytest.raises(RuntimeError, match="rollout 1 was drawn by the weights of rollout 0, and rollout 2 is to be"):
        draws.take(2, Timed())
    made: Any = SimpleNamespace(weights_version=1)
    draws.under_way = Future()
    draws.under_way.set_result(Drawn(3, "1", made, [], Mismatch(0.0, 1, 0.0)))
    with pytest.raises(RuntimeError, match="rollout 3 was drawn by the weights of rollout 1"):
        draws.take(3, Timed())
