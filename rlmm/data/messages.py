"""Chat messages to one prompt: what is read of a conversation, and what is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlmm.data.base import UnusableRow

IMAGE_PARTS = ("image", "image_url", "input_image")


@dataclass(frozen=True)
class Turn:
    """What a conversation asks for.

    `text`: text parts of the asking turns, a line each. `images`: their images as stored, in order; None
    stands for a part that only marks the place of an image kept in another column. `answer_images` and
    `answer_text`: of the answer, if the conversation ends with one. `unread`: earlier and system turns, which
    a prompt has no place for.
    """

    text: str
    images: tuple[Any, ...]
    answer_images: tuple[Any, ...]
    answer_text: str
    unread: int


def last_request(messages: Sequence[Any]) -> Turn:
    """The last request of a conversation: the run of user turns that ends it, or that its final answer
    follows.

    A message is {role, content}; content is text, or a list of parts {type: text, text} and {type: image,
    image} (or image_url: {url}). Raises UnusableRow where there is no user turn or a message is not of this
    form.
    """
    turns = [_message(message) for message in messages]
    end = len(turns)
    while end and turns[end - 1][0] == "assistant":
        end -= 1
    start = end
    while start and turns[start - 1][0] == "user":
        start -= 1
    if start == end:
        raise UnusableRow("messages without a user turn at their end")
    asked = [part for _, parts in turns[start:end] for part in parts]
    answered = [part for _, parts in turns[end:] for part in parts]
    return Turn(
        text=_lines(asked),
        images=tuple(value for kind, value in asked if kind == "image"),
        answer_images=tuple(value for kind, value in answered if kind == "image" and value is not None),
        answer_text=_lines(answered),
        unread=start,
    )


def answer_of(messages: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    """Text and images of an answer: one or more turns of the assistant. Raises UnusableRow where another turn is among
    them, or a message is not {role, content}."""
    turns = [_message(message) for message in messages]
    other = next((role for role, _ in turns if role != "assistant"), None)
    if other is not None:
        raise UnusableRow("answer with turns that are not the assistant's", f"a turn of role {other!r}")
    parts = [part for _, parts in turns for part in parts]
    return _lines(parts), tuple(value for kind, value in parts if kind == "image")


def _lines(parts: Sequence[tuple[str, Any]]) -> str:
    texts = [value.strip() for kind, value in parts if kind == "text" and value]
    return "\n".join(text for text in texts if text)


def _message(message: Any) -> tuple[str, list[tuple[str, Any]]]:
    """(role, [(text or image, value)]) of one message."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UnusableRow("messages that are not {role, content}")
    content = message.get("content")
    if content is None:
        return message["role"], []
    if isinstance(content, str):
        return message["role"], [("text", content)]
    if not isinstance(content, Sequence):
        raise UnusableRow("messages whose content is neither text nor a list of parts")
    return message["role"], [_part(part) for part in content]


def _part(part: Any) -> tuple[str, Any]:
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text"):
        return "text", part.get("text")
    if kind in IMAGE_PARTS:
        keys = ("image", "image_url", "url", "path", "bytes")
        value = next((part[key] for key in keys if part.get(key) is not None), None)
        return "image", value
    raise UnusableRow(f"messages with a part of type {kind!r}")
