"""The memory plan of supervised and of preference learning is what their updates hold."""

from dataclasses import replace

import pytest

from rlmm.config.preference import DpoStage, PairNoise
from rlmm.config.stages import SftStage
from rlmm.dry_run import Live, dry_run
from rlmm.planned_rows import Row, Rows
from rlmm.planned_update import law_of, update_of
from rlmm.policies.layout_io import Supervised
from rlmm.train.metrics import Meter
from rlmm.train.preferences import Preference, preference_batch, sequence_log_probs
from rlmm.train.sft import SftSource, sft_loss
from tests.integration.planned import planned, sizes

RECIPE = {"causal": "tiny.yaml", "masked": "tiny_masked.yaml"}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("causal", ()),
        ("causal", ("micro_batch_size=8",)),
        ("masked", ()),
        ("masked", ("noise={schedule: cosine}", "text_weight=0.0")),
        ("masked", ("noise={schedule: linear, complementary: true}", "text_weight=1.0")),
    ],
)
def test_supervised(family: str, settings: tuple[str, ...]) -> None:
    rows = ("stages.sft.batch_size=32", "stages.sft.micro_batch_size=32")
    given = [f"stages.sft.{one}" for one in settings]
    made = planned(RECIPE[family], "sft", sizes(family=family), *rows, *given)
    assert isinstance(made.stage, SftStage)
    source = SftSource(made.policy.layout, [made.row(number) for number in range(64)], made.stage, seed=1)
    batches = source.micro_batches(0)[:2]
    with Live() as live:
        for batch in batches:
            sft_loss(made.policy, made.policy.model, batch, Meter()).backward()
    assert made.passing > 10 << 20
    assert made.passing == pytest.approx(live.peak, rel=0.15)


def test_text_that_is_learnt_counts() -> None:
    """By its logits at least, which the backward pass needs."""
    made = planned(RECIPE["causal"], "sft", sizes(family="causal"))
    layout = made.policy.layout
    law, update = law_of(made.stage, layout), update_of(made.stage, layout, made.rows, 1)
    bare = dry_run(made.make, law, replace(update, text=0)).passing
    text = dry_run(made.make, law, replace(update, text=10_000)).passing
    assert text - bare > 10_000 * (layout.text[1] - layout.text[0]) * 4


@pytest.mark.parametrize("drawn", [True, False])
def test_answers_are_learnt_beside_pictures_or_alone(drawn: bool) -> None:
    """A stage of preferences as its update is planned: pairs of answers, and beside them as many of pictures."""
    stage = "stages.dpo={kind: dpo, steps: 1, learning_rate: 1.0e-3, start_from: sft, data: {path: pairs.parquet}, "
    made = planned(RECIPE["causal"], "dpo", sizes(), stage + "batch_size: 8, micro_batch_size: 8}")
    spelled = len(made.policy.layout.question(()))
    answer = Row(spelled + 20 + 70, 20, 70, image=False)
    rows = Rows(made.rows.own, answer) if drawn else Rows(answer)
    answers = [Supervised((7,) * 20, text=(7 + number % 3,) * 70) for number in range(9)]
    kinds = [answers, [made.row(number) for number in range(9)]][: 1 + drawn]
    pairs = [Preference((kind[number], kind[number + 1])) for kind in kinds for number in range(8)]
    batch = preference_batch(made.policy.layout, pairs, [1.0] * len(pairs))
    with Live() as live:
        sequence_log_probs(made.policy, batch, made.policy.model).sum().backward()
    found = replace(made, rows=rows).passing
    assert found > 5 << 20
    assert found == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize(
    ("family", "loss", "noise"),
    [
        ("causal", "sigmoid", None),
        ("causal", "kto", None),
        ("masked", "sigmoid", "{scheme: stratified, draws: 4}"),
        ("masked", "sigmoid", "{scheme: quadrature, draws: 3}"),
        ("masked", "kto", "{scheme: complement, draws: 2}"),
    ],
)
def test_preferences(family: str, loss: str, noise: str | None) -> None:
    said = "" if noise is None else f", noise: {noise}"
    stage = (
        "stages.dpo={kind: dpo, steps: 1, learning_rate: 1.0e-3, start_from: sft, data: {path: pairs.parquet}, "
        f"loss: {loss}, batch_size: 8, micro_batch_size: 8{said}}}"
    )
    made = planned(RECIPE[family], "dpo", sizes(family=family), stage)
    assert isinstance(made.stage, DpoStage)
    single = loss == "kto"
    sides = [(made.row(number),) if single else (made.row(number), made.row(number + 1)) for number in range(8)]
    batch = preference_batch(
        made.policy.layout,
        [Preference(side, desirable=True if single else None) for side in sides],
        [1.0] * 8,
        noise=None if noise is None else made.stage.noise or PairNoise(),
        seeds=range(8),
    )
    with Live() as live:
        sequence_log_probs(made.policy, batch, made.policy.model).sum().backward()
    assert made.passing > 10 << 20
    assert made.passing == pytest.approx(live.peak, rel=0.15)
