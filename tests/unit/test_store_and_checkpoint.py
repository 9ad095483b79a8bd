"""What is written comes back exactly; what is torn is noticed."""

from pathlib import Path

import pytest
import torch

from rlmm.train.checkpoint import MANIFEST, fault, latest_checkpoint, write_manifest
from rlmm.train.metrics import Meter, MetricsFile
from rollouts.law import Law
from rollouts.store import read_trajectory, write_trajectory
from rollouts.trajectory import Span, Stream, Trajectory, concatenate


def trajectory(rows: int = 2, prefix: int = 3, start: int = 0) -> Trajectory:
    generator = torch.Generator().manual_seed(rows + prefix)
    length = 4
    return Trajectory(
        ids=torch.randint(10, 20, (rows, length), generator=generator),
        attention_mask=torch.ones(rows, length, dtype=torch.bool),
        target_mask=torch.tensor([True, True, False, True]).expand(rows, -1).clone(),
        modality=torch.ones(rows, length, dtype=torch.int8),
        step=torch.arange(length, dtype=torch.int32).expand(rows, -1).clone(),
        span=torch.zeros(rows, length, dtype=torch.int8),
        spans=(Span("image", Law((10, 20), 0.7, 3.0, top_k=4), 4, advantage_weight=0.5),),
        streams={"cond": Stream(torch.arange(rows * prefix).reshape(rows, prefix), torch.ones(rows, prefix) > 0)},
        sampler_logp=-torch.rand(rows, length, dtype=torch.float64, generator=generator),
        seed=tuple(2**63 - 1 - start - i for i in range(rows)),
        group_id=tuple(f"g{start + i}" for i in range(rows)),
        sample_id=tuple(f"s{start + i}" for i in range(rows)),
        sources=tuple(("abc",) if i else () for i in range(rows)),
        weights_version=7,
        support=torch.randint(0, 255, (rows, length, 2), dtype=torch.uint8, generator=generator),
    )


def equal(a: Trajectory, b: Trajectory) -> bool:
    for name in ("ids", "attention_mask", "target_mask", "modality", "step", "span", "sampler_logp", "support"):
        left, right = getattr(a, name), getattr(b, name)
        if left.dtype != right.dtype or not torch.equal(left, right):
            return False
    streams = all(
        torch.equal(a.streams[n].ids_BP, b.streams[n].ids_BP)
        and torch.equal(a.streams[n].mask_BP, b.streams[n].mask_BP)
        for n in a.streams
    )
    names = ("spans", "seed", "group_id", "sample_id", "sources", "weights_version")
    return streams and all(getattr(a, n) == getattr(b, n) for n in names)


def test_a_stored_trajectory_comes_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step.parquet"
    write_trajectory(path, trajectory(), {"reward": [0.5, None], "image": [b"x", b"y"]})
    back, columns = read_trajectory(path)
    assert equal(back, trajectory())
    assert columns == {"reward": [0.5, None], "image": [b"x", b"y"]}


def test_a_torn_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step.parquet"
    write_trajectory(path, trajectory(), {})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a readable rollout"):
        read_trajectory(path)


def test_extra_columns_may_not_shadow_the_stores(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed"):
        write_trajectory(tmp_path / "x.parquet", trajectory(), {"seed": [1, 2]})


def test_rows_and_concatenation_keep_every_field() -> None:
    a, b = trajectory(2, 3), trajectory(3, 5, start=2)
    joined = concatenate([a, b], pad=0)
    assert len(joined) == 5 and joined.streams["cond"].ids_BP.shape == (5, 5)
    assert not joined.streams["cond"].mask_BP[0, :2].any()
    assert equal(joined.rows([2, 3, 4]), b)


def make_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(range(100)) * step)
    write_manifest(checkpoint)
    return checkpoint


def test_torn_checkpoints_are_passed_over_with_the_reason(tmp_path: Path) -> None:
    said: list[str] = []
    good = make_checkpoint(tmp_path, 10)
    changed, short, unsealed = (make_checkpoint(tmp_path, step) for step in (20, 30, 40))
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[5] ^= 1
    (changed / "model.safetensors").write_bytes(bytes(data))
    (short / "model.safetensors").unlink()
    (unsealed / MANIFEST).unlink()
    assert latest_checkpoint(tmp_path, said.append) == good
    assert [line.split(":")[0] for line in said] == [f"passing over checkpoint-{s}" for s in (40, 30, 20)]
    assert fault(good) is None and latest_checkpoint(tmp_path / "none", said.append) is None


def test_metrics_are_cut_back_and_torn_lines_dropped(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.append(step, {"loss": step / 3, "kl": float("nan")})
    with metrics.path.open("a") as handle:
        handle.write('{"step": 4, "lo')
    assert [row["step"] for row in metrics.read()] == [1, 2, 3]
    metrics.cut(2)
    assert metrics.path.read_text().count("\n") == 2
    assert metrics.read()[1] == {"step": 2, "loss": 2 / 3, "kl": None}


def test_the_meter_weighs_means_by_their_counts_and_keeps_the_largest() -> None:
    meter = Meter()
    meter.add("loss", 6.0, 3)
    meter.add("loss", 2.0, 1)
    meter.add("gap/max", 0.5)
    meter.add("gap/max", 0.2)
    meter.add("empty", 0.0, 0)
    meter.put({"reward": 1.5})
    assert meter.flush() == {"loss": 2.0, "gap/max": 0.5, "reward": 1.5}
    assert meter.flush() == {}
