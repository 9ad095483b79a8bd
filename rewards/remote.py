"""A reward that is served elsewhere (`rlmm reward serve`): here it is a reward like any other."""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ValidationError

from rewards.base import Sample, Score
from rewards.endpoint import Endpoint
from rewards.gold import GoldPair
from rewards.verifier.errors import EndpointError, shown
from rewards.wire import (
    PROTOCOL,
    ScoreAnswer,
    ScoreRequest,
    Served,
    WireError,
    WireSample,
    read_sample,
    read_score,
    send_sample,
)

CHECK_S = 10.0
"""Seconds that the server has to say what it serves."""


class RemoteError(EndpointError):
    """The served reward gave no answer that can be used; the runner makes its samples unavailable."""


class RemoteReward:
    """A served reward. Its fingerprint is the served one's, wherever it is served, and an answer by a reward of another
    fingerprint is refused: a server that was changed within a run is no silent change of the reward.

    `columns`: those of the row that are sent, None for all. Raises RemoteError where the server cannot be asked what it
    serves.
    """

    def __init__(self, endpoint: Endpoint, served: Served, columns: Sequence[str] | None = None) -> None:
        self.name = served.name
        self._endpoint, self._served, self._columns = endpoint, served, columns

    def fingerprint(self) -> str:
        """The served reward's, and the columns that it sees."""
        return f"remote/1 columns={self._columns} [{self._served.fingerprint}]"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order, by one request. Raises RemoteError."""
        sent = [send_sample(sample, self._columns) for sample in samples]
        ready = [item for item in sent if isinstance(item, WireSample)]
        answers = iter(self._ask(ready) if ready else [])
        return [next(answers) if isinstance(item, WireSample) else item for item in sent]

    def gold(self) -> Sequence[GoldPair]:
        """The served reward's pairs."""
        return [GoldPair(read_sample(pair.good), read_sample(pair.bad), pair.what) for pair in self._served.gold]

    def _ask(self, samples: list[WireSample]) -> list[Score]:
        body = ScoreRequest(protocol=PROTOCOL, samples=samples).model_dump_json().encode()
        response = self._endpoint.post("v1/score", body)
        try:
            answer = ScoreAnswer.model_validate_json(response.content)
            scores = [read_score(score) for score in answer.scores]
        except (ValidationError, WireError) as error:
            raise RemoteError(f"{self._endpoint.base} answered no scores: {shown(str(error))}") from error
        if answer.fingerprint != self._served.fingerprint:
            raise RemoteError(
                f"{self._endpoint.base} serves another reward than when this run asked it first "
                f"({shown(answer.fingerprint)}); start the old one again, or the run anew"
            )
        if len(scores) != len(samples):
            raise RemoteError(f"{self._endpoint.base} answered {len(scores)} scores for {len(samples)} samples")
        return scores


class RemoteGroupReward(RemoteReward):
    """A served reward that sees groups."""

    whole_groups: Literal[True] = True


def connect(url: str, token: str, *, columns: Sequence[str] | None = None, **settings: Any) -> RemoteReward:
    """The reward served at `url`; `settings` are those of its Endpoint. Raises ValueError for an address that is none,
    RemoteError for a server that does not answer, does not take the token or speaks another protocol.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
        raise ValueError(f"url {re.sub('//.*@', '//', url)!r} is no server's address, such as http://127.0.0.1:8900")
    endpoint = Endpoint(
        url.rstrip("/") + "/",
        key=token,
        failure=RemoteError,
        **settings,
    )
    served = _ask_what_is_served(endpoint)
    kind = RemoteGroupReward if served.whole_groups else RemoteReward
    return kind(endpoint, served, columns)


def _ask_what_is_served(endpoint: Endpoint) -> Served:
    try:
        response = endpoint.get("v1/reward", CHECK_S)
    except RemoteError as error:
        raise RemoteError(
            f"no reward is served at {endpoint.base} ({error}). Start it with `rlmm reward serve`, or mend the url"
        ) from error
    if response.status_code != 200:
        raise RemoteError(f"{endpoint.refusal(response)}. Is it `rlmm reward serve`, and token_env its token's?")
    try:
        served = Served.model_validate(json.loads(response.content))
    except ValueError as error:
        raise RemoteError(f"{endpoint.base} is no served reward: {shown(str(error))}") from error
    if served.protocol != PROTOCOL:
        raise RemoteError(
            f"{endpoint.base} speaks protocol {served.protocol}, this is {PROTOCOL}: update the older one"
        )
    return served
