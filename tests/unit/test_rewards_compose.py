"""Terms into totals: transforms, modes, gates, and failures that are never numbers."""

from collections.abc import Sequence
from typing import Any

import pytest

from rewards.base import Sample, Score
from rewards.compose import CompositeReward, Gate, Mode, Term
from rewards.runner import RewardContractError, RewardRunner
from rewards.transforms import Affine, identity

SAMPLES = [Sample("s", "g", "p")]


class Says:
    """Answers the same for every sample."""

    def __init__(self, answer: Any, name: str = "says") -> None:
        self.answer = answer
        self.name = name

    def fingerprint(self) -> str:
        return repr(self.answer)

    def score(self, samples: Sequence[Sample]) -> list[Any]:
        return [self.answer for _ in samples]


def total(answers: dict[str, Any], weights: dict[str, float] | None = None, **options: Any) -> Score:
    terms = [Term(name, RewardRunner(Says(answer)), (weights or {}).get(name, 1.0)) for name, answer in answers.items()]
    return CompositeReward(terms, **options).score(SAMPLES)[0].total


def test_a_weighted_sum_takes_the_weights_as_given() -> None:
    assert total({"a": 0.5, "b": 3.0}, {"a": 2.0, "b": -0.1}).value == pytest.approx(0.7)


def test_a_product_and_the_weighted_geometric_mean() -> None:
    modes: tuple[Mode, ...] = ("product", "geometric_mean")
    assert [total({"a": 0.25, "b": 1.0}, mode=mode).value for mode in modes] == pytest.approx([0.25, 0.5])
    weights = {"a": 1.0, "b": 3.0}
    assert [total({"a": 16.0, "b": 2.0}, weights, mode=mode).value for mode in modes] == pytest.approx([128, 128**0.25])
    assert [total({"a": 0.0, "b": 1.0}, mode=mode).value for mode in modes] == [0.0, 0.0]


@pytest.mark.parametrize("mode", ["product", "geometric_mean"])
def test_a_product_of_a_negative_value_is_unavailable_and_names_the_term(mode: Mode) -> None:
    score = total({"good": 0.5, "cosine": -0.2}, mode=mode)
    assert score.status == "unavailable" and "cosine" in score.reason


def test_min_takes_the_worst_term() -> None:
    assert total({"a": 0.9, "b": 0.2}, mode="min").value == 0.2


@pytest.mark.parametrize(("raw", "mapped"), [(18.0, 0.0), (20.0, 0.0), (25.0, 0.5), (30.0, 1.0), (31.0, 1.0)])
def test_affine_maps_its_ends_to_0_and_1_and_clips(raw: float, mapped: float) -> None:
    assert Affine(20.0, 30.0)(raw) == mapped
    assert Affine(30.0, 20.0)(raw) == 1 - mapped


def test_a_transform_applies_before_the_weight_and_not_to_the_logged_score() -> None:
    composite = CompositeReward([Term("a", RewardRunner(Says(25.0)), 4.0, Affine(20, 30))])
    scored = composite.score(SAMPLES)[0]
    assert scored.total.value == 2.0
    assert scored.terms["a"].value == 25.0


def test_parts_of_a_score_make_the_raw_value_and_the_log_keeps_the_score() -> None:
    score = Score.ok(0.75, exact=1.0, recall=0.5)

    def composite(parts: dict[str, float]) -> CompositeReward:
        return CompositeReward([Term("read", RewardRunner(Says(score)), 2.0, Affine(0.0, 2.0), parts)])

    (scored,) = composite({"value": 0.2, "exact": 0.5, "recall": -0.1}).score(SAMPLES)
    assert scored.total.value == pytest.approx(2.0 * (0.2 * 0.75 + 0.5 - 0.05) / 2.0)
    assert scored.terms["read"] == score
    with pytest.raises(RewardContractError, match="'read' asks for the part 'exakt'.*exact"):
        composite({"exakt": 1.0}).score(SAMPLES)


@pytest.mark.parametrize("mode", ["weighted_sum", "product", "geometric_mean", "min"])
def test_an_unavailable_term_makes_the_total_unavailable_and_is_named(mode: Any) -> None:
    score = total({"fine": 1.0, "ocr": Score.unavailable("engine died")}, mode=mode)
    assert score.status == "unavailable" and score.value is None
    assert score.reason == "ocr: engine died"


def test_invalid_output_wins_over_unavailable() -> None:
    score = total({"a": Score.unavailable("busy"), "b": Score.invalid_output("torn image")})
    assert score.status == "invalid_output" and score.reason == "b: torn image"


def test_a_term_of_weight_0_is_logged_and_cannot_take_the_total_down() -> None:
    terms = [
        Term("a", RewardRunner(Says(0.5))),
        Term("watch", RewardRunner(Says(Score.unavailable("down"))), 0.0),
    ]
    scored = CompositeReward(terms).score(SAMPLES)[0]
    assert scored.total.value == 0.5
    assert scored.terms["watch"].reason == "down"


def test_a_gate_puts_the_floor_below_its_threshold_only() -> None:
    gate = Gate("veto", 0.5, floor=-1.0)
    weights = {"veto": 0.0}
    assert total({"a": 0.9, "veto": 0.49}, weights, gates=[gate]).value == -1.0
    assert total({"a": 0.9, "veto": 0.5}, weights, gates=[gate]).value == 0.9


def test_of_several_shut_gates_the_lowest_floor_counts() -> None:
    gates = [Gate("veto", 0.5, floor=-1.0), Gate("copy", 0.1, floor=0.2)]
    weights = {"veto": 0.0, "copy": 0.0}
    for veto, copy, value in ((0.4, 0.0, -1.0), (0.6, 0.0, 0.2), (0.4, 0.2, -1.0), (0.6, 0.2, 0.9)):
        assert total({"a": 0.9, "veto": veto, "copy": copy}, weights, gates=gates).value == value


def test_a_gate_that_cannot_be_read_is_not_open() -> None:
    score = total({"a": 0.9, "veto": None}, {"veto": 0.0}, gates=[Gate("veto", 0.5)])
    assert score.status == "unavailable" and "veto" in score.reason


def test_each_sample_gets_its_own_total_in_order() -> None:
    class Length(Says):
        def score(self, samples: Sequence[Sample]) -> list[Any]:
            return [float(len(sample.prompt)) for sample in samples]

    composite = CompositeReward([Term("a", RewardRunner(Length(None), batch_size=2))])
    samples = [Sample(str(n), "g", "x" * n) for n in (3, 1, 2)]
    assert [scored.total.value for scored in composite.score(samples)] == [3, 1, 2]


@pytest.mark.parametrize(
    ("terms", "options", "message"),
    [
        ([("a", 1.0), ("a", 1.0)], {}, "different names"),
        ([("a", 0.0)], {}, "weight other than 0"),
        ([], {}, "weight other than 0"),
        ([("a", -1.0)], {"mode": "product"}, "no negative one"),
        ([("a", 1.0)], {"mode": "min", "normalise_terms": True}, "other scales"),
        ([("safety", 1.0)], {"gates": [Gate("safty", 0.5)]}, "Nearest: safety"),
    ],
)
def test_composites_that_cannot_work_are_refused(
    terms: list[tuple[str, float]], options: dict[str, Any], message: str
) -> None:
    built = [Term(name, RewardRunner(Says(1.0)), weight, identity) for name, weight in terms]
    with pytest.raises(ValueError, match=message):
        CompositeReward(built, **options)
