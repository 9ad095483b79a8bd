"""The memory plan of supervised and of preference learning is what their updates hold."""

from dataclasses import replace

import pytest

from rlmm.config.preference import DpoStage, PairNoise
from rlmm.config.stages import SftStage
from rlmm.dry_run import Live, dry_run
from rlmm.memory import _law, _update
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
    law, update = _law(made.stage, layout), _update(made.stage, layout, made.asked, 1)
    bare = dry_run(made.make, law, replace(update, text=0)).passing
    text = dry_run(made.make, law, replace(update, text=10_000)).passing
    assert text - bare > 10_000 * (layout.text[1] - layout.text[0]) * 4


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
