"""What SFT learns from rows with texts, and the codes that are kept on disk."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from rlmm.codecs import Codec, build_codec
from rlmm.config.codec import FsqCodec
from rlmm.config.policy import NewPolicy
from rlmm.config.sampling import Writing
from rlmm.config.stages import SftStage
from rlmm.data.base import Dataset, Example, Outline
from rlmm.policies.families.llama import build
from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.sft import SftSource
from rlmm.train.supervised import encode_rows
from rlmm.train.tokens import ImageTokens
from rollouts.trajectory import IMAGE, TEXT

GRID = (2, 3)


def make_policy() -> TransformerPolicy:
    return build(
        NewPolicy(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24), num_codes=64, grid=GRID, seed=0
    )


def make_codec(seed: int = 0) -> Codec:
    torch.manual_seed(seed)
    return build_codec(FsqCodec(levels=(4, 4, 4), image_size=(16, 24), channels=1, patch=8, width=8, blocks=1)).eval()


def picture(value: int) -> Image.Image:
    return Image.linear_gradient("L").resize((24, 16)).point(lambda p: (p * value) % 256)


class Rows(Dataset):
    """Rows of a list."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows, self.excluded = rows, Counter()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]

    def outline(self, index: int) -> Outline:
        return Outline(self.rows[index].prompt, len(self.rows[index].sources))


def test_a_texts_tokens_are_the_targets_and_the_prompts_are_not() -> None:
    layout = make_policy().layout
    image, low = list(range(6)), layout.image[0]
    batch = supervised_batch(
        layout, [Supervised([50, 51], image, text=[60, 61, 2]), Supervised([50], None, [[low, low]], text=[62, 2])]
    )
    thought, answer = batch.target_BT[0], batch.target_BT[1]
    assert batch.ids_BT[0, thought & (batch.modality_BT[0] == TEXT)].tolist() == [60, 61, 2]
    assert (batch.ids_BT[0, thought & (batch.modality_BT[0] == IMAGE)] - low).tolist() == image
    assert batch.ids_BT[0, : 1 + 2 + 3 + 1].tolist() == [layout.bos, 50, 51, 60, 61, 2, *layout.boi]
    assert batch.ids_BT[1, answer].tolist() == [62, 2] and not (answer & (batch.modality_BT[1] == IMAGE)).any()
    assert batch.ids_BT[1, batch.mask_BT[1]].tolist() == [layout.bos, *layout.boi, low, low, 50, 62, 2]


def test_begin_of_image_is_no_target_however_long_it_is() -> None:
    layout = dataclasses.replace(make_policy().layout, boi=(4, 7, 5))
    batch = supervised_batch(layout, [Supervised([50, 51], list(range(6)))])
    text = batch.target_BT[0] & (batch.modality_BT[0] == TEXT)
    assert batch.ids_BT[0, text].tolist() == [50, 51]


def test_rows_are_spelled_with_their_stop_token_and_template_and_bad_ones_are_counted() -> None:
    policy, tokens = make_policy(), ImageTokens(make_codec())
    data = Rows(
        [
            Example("ab", picture(1)),
            Example("ab", picture(2), texts=("cd", "x")),
            Example("ab", sources=(picture(3),), texts=("cd",)),
            Example("ab"),
            Example("ab", codes=tuple(range(6))),
            Example("ab", texts=("\u00e9",)),
            Example("ab", texts=("c" * 300,)),
        ]
    )
    rows, left_out = encode_rows(tokens, policy.spelling, Writing(template="Q {prompt} A"), data)
    assert left_out.total() == 3 and len(left_out) == 3
    plain, thought, answer, given = rows
    ids = {text: policy.encode_prompt(text) for text in ("ab", "cd", "Q ab A")}
    eos = policy.tokenizer.eos_token_id
    assert (plain.prompt, list(plain.text)) == (ids["ab"], []) and plain.image is not None
    assert (thought.prompt, list(thought.text)) == (ids["Q ab A"], [*ids["cd"], eos]) and thought.image is not None
    assert answer.image is None and len(answer.sources) == 1 and list(answer.text) == [*ids["cd"], eos]
    assert list(given.image or ()) == list(range(6))
    with pytest.raises(ValueError, match="they are another's"):
        encode_rows(tokens, policy.spelling, Writing(), Rows([Example("ab", codes=(64,) * 6)]))
    with pytest.raises(ValueError, match="can be learnt from"):
        encode_rows(tokens, policy.spelling, Writing(), Rows([Example("ab")]))


def test_what_guidance_drops_is_prompt_and_thought_and_never_an_answers_question() -> None:
    layout = make_policy().layout
    thought = Supervised([50, 51], list(range(6)), text=[60, 2])
    answer = Supervised([52], None, text=[61, 2])
    config = SftStage(
        steps=1, learning_rate=1e-3, batch_size=64, micro_batch_size=64, prompt_dropout=0.5, text_weight=1.0
    )
    (batch,) = SftSource(layout, [thought, answer], config, seed=1).micro_batches(0)
    with_60 = (batch.sequences.ids_BT == 60).any(1)
    drawn = (batch.sequences.modality_BT == IMAGE).any(1)
    null = (batch.sequences.ids_BT == layout.null_prompt[0]).any(1)
    assert int(drawn.sum()) == 32 and torch.equal(drawn & ~with_60, null) and 5 < int(null.sum()) < 27
    assert not null[~drawn].any() and (batch.sequences.ids_BT[~drawn] == 52).any(1).all()


def test_understanding_has_its_share_of_every_batch_and_leaves_the_other_rows_order() -> None:
    layout = make_policy().layout
    rows = [Supervised([50 + i], list(range(6))) for i in range(8)]
    others = [Supervised([40], None, text=[41 + i, 2]) for i in range(4)]
    base = {"steps": 1, "learning_rate": 1e-3, "micro_batch_size": 4, "prompt_dropout": 0, "text_weight": 1.0}
    half = SftStage.model_validate({**base, "batch_size": 8, "understanding_share": 0.5})
    mixed = SftSource(layout, rows, half, 1, others)
    alone = SftSource(layout, rows, SftStage.model_validate({**base, "batch_size": 4}), 1)
    for step in range(3):
        whole = torch.cat([b.sequences.ids_BT[:, 1] for b in mixed.micro_batches(step)]).tolist()
        assert sorted(t for t in whole if t >= 50) == sorted(
            alone.micro_batches(step)[0].sequences.ids_BT[:, 1].tolist()
        )
        assert whole.count(40) == 4


def test_codes_are_made_once_kept_by_codec_and_a_torn_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, images = make_codec(), [picture(1), picture(2), picture(1)]
    tokens = ImageTokens(codec, tmp_path)
    wanted = ImageTokens(codec).codes(images)
    assert torch.equal(tokens.codes(images), wanted)
    tokens.save()
    tokens.save()
    (file,) = tmp_path.glob("*/*.parquet")
    asked: list[int] = []
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda x: asked.append(len(x)) or encode(x))
    again = ImageTokens(codec, tmp_path)
    assert torch.equal(again.codes(images), wanted) and not asked
    assert torch.equal(again.codes([picture(3)]), ImageTokens(codec).codes([picture(3)])) and asked[0] == 1
    other = make_codec(seed=1)
    assert torch.equal(ImageTokens(other, tmp_path).codes(images), ImageTokens(other).codes(images))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="delete it, and they are made again"):
        ImageTokens(codec, tmp_path)
