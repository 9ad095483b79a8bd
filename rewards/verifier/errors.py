"""How a judge fails. Each of these makes a sample unavailable, and none of them a number."""

SHOWN = 200
"""Characters of a foreign text that an error repeats."""


class EndpointError(OSError):
    """A server gave no answer that can be used; the text says why."""


class JudgeError(EndpointError):
    """The judge gave no answer that can be used; the text says why."""


class BadAnswerError(JudgeError):
    """The judge answered, and not in the form asked for."""


def shown(text: str) -> str:
    """A foreign text on one line, cut to SHOWN characters, in quotes."""
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN else line[:SHOWN] + "...")
