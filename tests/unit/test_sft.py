"""SFT batches and loss: what is a target, what is dropped, and that cutting a step changes nothing."""

import pytest
import torch

from rlmm.config.data import WordsData
from rlmm.config.stages import SftStage
from rlmm.data import build_dataset
from rlmm.policies.layout_io import Supervised, read_codes, spell_image, supervised_batch
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.metrics import Meter
from rlmm.train.sft import SftBatch, SftSource, sft_loss
from rlmm.train.supervised import first_rows
from rollouts.trajectory import IMAGE, TEXT
from tests.parity.test_sampler_trainer import CODES, GRID, make_policy

COUNT = 12


def stage(**changes: object) -> SftStage:
    base = {"steps": 4, "learning_rate": 1e-3, "batch_size": 8, "micro_batch_size": 4, "text_weight": 0.5}
    return SftStage.model_validate(base | changes)


def rows(policy: TransformerPolicy, *, sources: bool = False) -> list[Supervised]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, CODES, (COUNT, GRID[0] * GRID[1]), generator=generator)
    given = [[spell_image(policy.layout, codes[(i + 1) % COUNT].tolist())] if sources else [] for i in range(COUNT)]
    return [Supervised(policy.encode_prompt("x" * (1 + i % 5)), codes[i].tolist(), given[i]) for i in range(COUNT)]


def source(policy: TransformerPolicy, config: SftStage, *, sources: bool = False) -> SftSource:
    return SftSource(policy.layout, rows(policy, sources=sources), config, seed=5)


def step_loss(policy: TransformerPolicy, batches: list[SftBatch]) -> tuple[float, torch.Tensor]:
    policy.model.zero_grad()
    meter, total = Meter(), 0.0
    for batch in batches:
        loss = sft_loss(policy, policy.model, batch, meter)
        loss.backward()
        total += float(loss.detach())
    gradient = policy.model.get_input_embeddings().weight.grad
    assert isinstance(gradient, torch.Tensor)
    return total, gradient.clone()


@pytest.mark.parametrize("row_ends", [False, True])
def test_targets_are_the_prompts_text_and_the_images_codes(row_ends: bool) -> None:
    layout = make_policy(row_ends=row_ends).layout
    image = list(range(12))
    spelled = spell_image(layout, [11 - code for code in image])
    batch = supervised_batch(layout, [Supervised([50, 51], image, [spelled]), Supervised([52], image)])
    for row, prompt in enumerate(([50, 51], [52])):
        at = batch.target_BT[row]
        text, picture = at & (batch.modality_BT[row] == TEXT), at & (batch.modality_BT[row] == IMAGE)
        assert batch.ids_BT[row, text].tolist() == prompt
        assert (batch.ids_BT[row, picture] - layout.image[0]).tolist() == image
    start = 2 + len(spelled)  # bos, begin-of-image, source
    assert not batch.target_BT[0, :start].any() and batch.ids_BT[0, 2:start].tolist() == spelled
    width = int(batch.mask_BT[1].sum())
    assert not batch.mask_BT[1, width:].any() and (batch.ids_BT[1, width:] == layout.pad).all()
    response = batch.ids_BT[0, batch.mask_BT[0]][-layout.grid.length :]
    assert read_codes(layout, response.unsqueeze(0))[0].tolist() == image


def test_a_step_is_the_same_however_it_is_cut() -> None:
    policy = make_policy()
    whole = step_loss(policy, source(policy, stage(micro_batch_size=8)).micro_batches(2))
    parts = step_loss(policy, source(policy, stage(micro_batch_size=2)).micro_batches(2))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-4, atol=1e-6)


def test_the_weights_of_a_step_sum_to_one_and_follow_the_modalities() -> None:
    policy = make_policy()
    batches = source(policy, stage(prompt_dropout=0)).micro_batches(0)
    text = image = 0.0
    for batch in batches:
        kind = batch.sequences.modality_BT
        text += float(batch.weight_BT[kind == TEXT].sum())
        image += float(batch.weight_BT[kind == IMAGE].sum())
    counts = [sum(int((b.sequences.target_BT & (b.sequences.modality_BT == k)).sum()) for b in batches) for k in (0, 1)]
    assert text + image == pytest.approx(1)
    assert text / image == pytest.approx(0.5 * counts[0] / counts[1])


def test_the_loss_is_the_weighted_cross_entropy_of_plain_transformers() -> None:
    policy = make_policy()
    (batch,) = source(policy, stage(micro_batch_size=8, text_weight=0)).micro_batches(1)
    ours = float(sft_loss(policy, policy.model, batch, Meter()).detach())
    low, high = policy.layout.image
    where = batch.sequences.target_BT & (batch.sequences.modality_BT == IMAGE)
    with torch.no_grad():
        logits = policy.model(batch.sequences.ids_BT, attention_mask=batch.sequences.mask_BT).logits[:, :-1, low:high]
    targets = batch.sequences.ids_BT[:, 1:][where[:, 1:]] - low
    expected = torch.nn.functional.cross_entropy(logits[where[:, 1:]], targets)
    assert ours == pytest.approx(float(expected), rel=1e-5)


def test_dropped_prompts_become_the_null_prompt_and_half_of_them_lose_the_source() -> None:
    policy = make_policy()
    config = stage(batch_size=12, micro_batch_size=12, prompt_dropout=0.5)
    data = source(policy, config, sources=True)
    null, seen = policy.layout.null_prompt[0], {"kept": 0, "no prompt": 0, "bare": 0}
    for step in range(40):
        for row in data.micro_batches(step)[0].sequences.ids_BT.tolist():
            dropped, with_source = null in row, row.count(*policy.layout.boi) == 2
            seen["kept" if not dropped else "no prompt" if with_source else "bare"] += 1
            assert dropped or with_source
    total = sum(seen.values())
    assert seen["kept"] / total == pytest.approx(0.5, abs=0.08)
    assert seen["bare"] / total == pytest.approx(0.25, abs=0.06)


def test_a_stage_may_use_the_first_pairs_alone() -> None:
    data = build_dataset(WordsData(train_images=30), "train", 0)
    few = first_rows(data, 7)
    assert [row.prompt for row in few] == [data[i].prompt for i in range(7)]
    assert first_rows(data, None) is data
    with pytest.raises(ValueError, match=r"images: 31 asks for more than the 30 pairs"):
        first_rows(data, 31)


def test_rows_are_sorted_by_length_and_every_epoch_sees_every_row() -> None:
    policy = make_policy()
    data = source(policy, stage(batch_size=12, micro_batch_size=4, prompt_dropout=0))
    batches = data.micro_batches(3)
    widths = [int(length) for batch in batches for length in batch.sequences.mask_BT.sum(1)]
    assert widths == sorted(widths)
    assert [batch.sequences.ids_BT.shape[1] for batch in batches] == [max(widths[i : i + 4]) for i in (0, 4, 8)]
    spelled = {tuple(ids[ids >= policy.layout.image[0]].tolist()) for b in batches for ids in b.sequences.ids_BT}
    assert len(spelled) == COUNT
    again = data.micro_batches(3)
    assert all(torch.equal(a.sequences.ids_BT, b.sequences.ids_BT) for a, b in zip(batches, again, strict=True))
    other = data.micro_batches(4)
    assert not torch.equal(other[0].sequences.ids_BT, batches[0].sequences.ids_BT)
