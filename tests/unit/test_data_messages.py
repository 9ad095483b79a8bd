"""What is read of a conversation."""

import pytest

from rlmm.data.base import UnusableRow
from rlmm.data.messages import last_request


def user(*parts: object) -> dict:
    return {
        "role": "user",
        "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts),
    }


def text(words: str | None) -> dict:
    return {"type": "text", "text": words, "image": None}


def image(value: object) -> dict:
    return {"type": "image", "text": None, "image": value}


def test_the_last_user_turn_is_the_prompt_and_the_rest_is_counted() -> None:
    turn = last_request(
        [
            {"role": "system", "content": "Be brief."},
            user("draw a cat"),
            {"role": "assistant", "content": [image(b"cat")]},
            user(image(b"a"), text(" make it "), text("blue\n")),
        ]
    )
    assert (turn.text, turn.images, turn.answer_images, turn.unread) == ("make it\nblue", (b"a",), (), 3)


def test_user_turns_in_a_row_are_one_request() -> None:
    turn = last_request([user("one"), user(text("two"), image(b"b")), user("three")])
    assert (turn.text, turn.images, turn.unread) == ("one\ntwo\nthree", (b"b",), 0)


def test_the_final_answer_is_not_the_prompt() -> None:
    turn = last_request([user("draw"), {"role": "assistant", "content": [text("Here:"), image(b"c")]}])
    assert (turn.text, turn.images, turn.answer_images) == ("draw", (), (b"c",))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": b"x"},
        {"type": "image_url", "image_url": b"x"},
        {"type": "input_image", "image_url": b"x"},
        {"type": "image", "path": b"x"},
        {"type": "image", "bytes": b"x"},
    ],
)
def test_image_parts_of_several_dialects(part: dict) -> None:
    assert last_request([user(part, "hi")]).images == (b"x",)


def test_an_image_part_may_only_mark_a_place() -> None:
    assert last_request([user({"type": "image"}, text("?"))]).images == (None,)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "without a user turn"),
        ([{"role": "assistant", "content": "hi"}], "without a user turn"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "without a user turn"),
        (["hello"], "not {role, content}"),
        ([{"content": "hello"}], "not {role, content}"),
        ([{"role": "user", "content": 3}], "neither text nor a list"),
        ([user({"type": "audio", "audio": b""}, "x")], "type 'audio'"),
    ],
)
def test_other_forms_are_unusable(messages: list, reason: str) -> None:
    with pytest.raises(UnusableRow, match=reason):
        last_request(messages)
