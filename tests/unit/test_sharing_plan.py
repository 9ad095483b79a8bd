"""What one of several processes holds, by hand for 1000 bytes of weights of which 800 are trained.

Activations take 450 bytes at most, and with the gradients that are there by then 1100.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlmm.dry_run import Held
from rlmm.sharing import Share, Sharing, read_sharing, shared

HELD = Held(weights=1000, gradients=800, optimizer=1600, peak=1600 + 1100, passing=1100, activations=450)
BUCKET, LIVE = 64, 10_000


def test_one_process_holds_everything() -> None:
    assert shared(HELD, Sharing()) == Share(1000, 800, 1600, 300, exchange=0, offloaded=0)


def test_plain_processes_hold_everything_and_buckets_of_all_gradients() -> None:
    assert shared(HELD, Sharing(4)) == Share(1000, 800, 1600, 300, exchange=800, offloaded=0)


@pytest.mark.parametrize(
    ("processes", "zero", "share"),
    [
        # optimizer: two moments and the flat copy, a part of each; working: what a backward holds beside the gradients
        # that are counted, or what a step lays flat beside them
        (4, 1, Share(1000, 800, 400 + 200, 1100 - 800, BUCKET, 0)),
        (4, 2, Share(1000, 200, 400 + 200, 450, BUCKET, 0)),
        (4, 3, Share(250, 200, 400 + 200, 450, BUCKET + 1000, 0)),
        (1, 1, Share(1000, 800, 1600 + 800, 800, BUCKET, 0)),
        (1, 2, Share(1000, 800, 1600 + 800, 800, BUCKET, 0)),
        (2, 1, Share(1000, 800, 800 + 400, 300, BUCKET, 0)),
    ],
)
def test_zero_divides_more_with_every_stage(processes: int, zero: int, share: Share) -> None:
    assert shared(HELD, Sharing(processes, zero, BUCKET, LIVE)) == share


def test_zero2_adds_the_gradients_of_a_micro_batch_to_those_before_it() -> None:
    twice = replace(HELD, again=True)
    assert shared(twice, Sharing(4, 2, BUCKET, LIVE)) == Share(1000, 2 * 200, 400 + 200, 450, BUCKET, 0)
    for zero in (0, 1, 3):
        assert shared(twice, Sharing(4, zero, BUCKET, LIVE)) == shared(HELD, Sharing(4, zero, BUCKET, LIVE))


def test_no_more_weights_are_gathered_than_may_live() -> None:
    assert shared(HELD, Sharing(4, 3, BUCKET, 300)).exchange == BUCKET + 300


def test_what_is_offloaded_is_the_cpus() -> None:
    two = shared(HELD, Sharing(4, 2, BUCKET, LIVE, offloads_optimizer=True))
    assert (two.weights, two.gradients, two.optimizer, two.offloaded) == (1000, 0, 0, 600 + 200)
    three = shared(HELD, Sharing(4, 3, BUCKET, LIVE, offloads_optimizer=True, offloads_weights=True))
    assert (three.weights, three.gradients, three.optimizer, three.offloaded) == (0, 0, 0, 600 + 200 + 250)


def test_buckets_are_read_from_the_file(tmp_path: Path) -> None:
    def read(**zero: object) -> Sharing:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 2} | zero}))
        return read_sharing(str(path), 4, hidden_size=32)

    assert read_sharing(None, 4, 32) == Sharing(4)
    assert read(reduce_bucket_size="auto").bucket == 32 * 32 * 4
    assert read(reduce_bucket_size=100, overlap_comm=True).bucket == 100 * 4 * 2
    assert read().bucket == 2_000_000_000  # DeepSpeed's own default, which is allocated whole
    assert read(stage=3, stage3_max_live_parameters=5).live == 20
    assert read(offload_optimizer={"device": "cpu"}).offloads_optimizer
    assert not read(offload_optimizer={"device": "none"}, offload_param=None).offloads_optimizer


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_the_shipped_files_size_their_buckets_by_the_model(name: str) -> None:
    path = Path(__file__).parents[2] / "configs" / "deepspeed" / f"{name}.json"
    assert read_sharing(str(path), 2, hidden_size=4096).bucket == 4096 * 4096 * 4
