"""Gates stop what they must and nothing else; draws are functions of their counters."""

import numpy as np
import pytest
import torch

from rlmm.config.stages import Gates
from rlmm.evaluation.statistics import duplicate_share
from rlmm.seeds import derive, epoch_indices, generator
from rlmm.train.gates import GateError, check_mismatch, check_shares, finite, measure_mismatch
from rlmm.train.grpo_source import spread
from rollouts import fingerprint
from rollouts.fingerprint import weights_fingerprint


def test_the_mismatch_is_measured_over_targets_alone() -> None:
    logp = torch.tensor([[-1.0, -2.0, -3.0]])
    sampler = torch.tensor([[-1.5, -2.0, 9.0]], dtype=torch.float64)
    found = measure_mismatch(logp, sampler, torch.tensor([[True, True, False]]))
    assert (found.mean, found.largest, found.count) == (0.25, 0.5, 2)
    assert measure_mismatch(logp, sampler, torch.zeros(1, 3, dtype=torch.bool)).mean == 0


@pytest.mark.parametrize(
    ("gap", "precision", "gates", "stops"),
    [
        (5e-6, "float32", {}, False),
        (5e-5, "float32", {}, True),
        (5e-3, "bfloat16", {}, False),
        (5e-2, "bfloat16", {}, True),
        (5e-5, "float32", {"mismatch_mean": 1e-4}, False),
        (5e-5, "float32", {"mismatch_mean": 1e-4, "mismatch_max": 1e-5}, True),
        (5.0, "float32", {"off_policy": "allow"}, False),
    ],
)
def test_the_mismatch_gate(gap: float, precision: str, gates: dict, stops: bool) -> None:
    logp = torch.zeros(4, 4)
    found = measure_mismatch(logp, logp.double() + gap, torch.ones(4, 4, dtype=torch.bool))
    if stops:
        with pytest.raises(GateError, match="not the sampler's"):
            check_mismatch(found, Gates(**gates), precision)
    else:
        check_mismatch(found, Gates(**gates), precision)


def test_one_large_mismatch_stops_even_where_the_mean_is_small() -> None:
    sampler = torch.zeros(100, 100, dtype=torch.float64)
    sampler[3, 4] = 0.05
    found = measure_mismatch(torch.zeros(100, 100), sampler, torch.ones(100, 100, dtype=torch.bool))
    assert found.mean < 1e-5
    with pytest.raises(GateError, match=r"max 0\.05"):
        check_mismatch(found, Gates(), "float32")


def test_share_gates_need_patience_in_a_row() -> None:
    gates, bad, good = Gates(patience=3), {"group/flat_share": 1.0}, {"group/flat_share": 0.5}
    others = {"sample/unavailable_share": 0.0, "sample/duplicate_share": 0.0}
    update = {"step": 4, "loss": 0.1}  # a second update of a rollout: no rollout of its own
    check_shares([{**bad, **others}], {**bad, **others}, gates)
    check_shares([{**bad, **others}, {**good, **others}], {**bad, **others}, gates)
    with pytest.raises(GateError, match="look at the images"):
        check_shares([{**bad, **others}, update, {**bad, **others}], {**bad, **others}, gates)
    ids, mask, group = np.zeros((8, 5)), np.ones((8, 5), bool), ["a"] * 4 + ["b"] * 4
    collapsed = {**good, **others, "sample/duplicate_share": duplicate_share(ids, mask, group)}
    with pytest.raises(GateError, match="collapsed"):
        check_shares([], collapsed, Gates(patience=1))


def test_a_loss_that_is_no_number_stops() -> None:
    finite(torch.tensor(1.0), "loss", 3)
    with pytest.raises(GateError, match="gradient is nan at step 3; no update was made"):
        finite(torch.tensor(float("nan")), "gradient", 3)


def test_seeds_tell_their_parts_apart() -> None:
    seeds = {
        derive(0, "a", 1),
        derive(0, "a", 2),
        derive(0, "b", 1),
        derive(0, "a1"),
        derive(0, "a", "1"),
        derive(1, "a", 1),
    }
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert generator(1, "x").random() == generator(1, "x").random() != generator(1, "y").random()


def test_epochs_are_permutations_whatever_the_step_size() -> None:
    together = epoch_indices(7, 0, 21, 3)
    for epoch in range(3):
        assert sorted(together[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert together[:7] != together[7:14]
    assert [i for first in range(0, 21, 3) for i in epoch_indices(7, first, 3, 3)] == together
    with pytest.raises(ValueError, match="no rows"):
        epoch_indices(0, 0, 1, 3)


@pytest.mark.parametrize(("rows", "parts"), [(8, 4), (5, 3), (2, 4), (0, 2)])
def test_rows_are_spread_evenly_and_kept_in_order(rows: int, parts: int) -> None:
    cut = spread(list(range(rows)), parts)
    assert len(cut) == parts and [row for part in cut for row in part] == list(range(rows))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


def test_a_fingerprint_is_the_same_whatever_adds_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of floating-point numbers are not: two threads give others than one, and a GPU others than a CPU."""
    weight = torch.randn(300, 2000, generator=torch.Generator().manual_seed(0)).mul(5).exp()
    weight[0, 0], weight[1, 1] = 0.0, 1e-40
    base, threads = weights_fingerprint([("a", weight)]), torch.get_num_threads()
    torch.set_num_threads(2)
    assert weights_fingerprint([("a", weight)]) == base
    torch.set_num_threads(threads)
    monkeypatch.setattr(fingerprint, "PART", {"cpu": 7919})
    weight[0, 0], weight[1, 1] = -0.0, 0.0
    assert weights_fingerprint([("a", weight)]) == base
    halves = weights_fingerprint([("a", weight)], torch.bfloat16)
    assert halves == weights_fingerprint([("a", weight.bfloat16())]) != base
    assert weights_fingerprint([("a", weight[:0])]) != base


def test_a_fingerprint_sees_a_change_of_value_place_name_or_shape() -> None:
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    base = weights_fingerprint([("a", weight), ("b", weight + 1)])
    assert base == weights_fingerprint([("b", weight + 1), ("a", weight)])
    swapped = weight.clone()
    swapped[0, 0], swapped[0, 1] = weight[0, 1].item(), weight[0, 0].item()
    nudged = weight.clone()
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(9.0))
    for other in (swapped, nudged, weight.T):
        assert weights_fingerprint([("a", other), ("b", weight + 1)]) != base
    assert weights_fingerprint([("a", weight), ("c", weight + 1)]) != base
