"""The breaker, and the limit on requests that rewards with one address share."""

import threading
import time
from typing import Any

import pytest
from PIL import Image

from rewards.base import Sample
from rewards.breaker import Breaker
from rewards.endpoint import Endpoint
from rewards.verifier.errors import EndpointError
from rewards.verifier.yes_no import YesNoReward
from tests.unit.test_verifier_stub import Reply, serving, tokens

DRAWN = Sample("s", "g", "a red cat", (Image.new("RGB", (5, 4), "red"),))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_try_after_the_cooldown() -> None:
    clock = Clock()
    breaker = Breaker(3, 10.0, clock)
    for failure in ("a", "b", "", "c", "d"):
        assert breaker.refusal() == ""
        breaker.note(failure)
    assert breaker.refusal() == ""
    breaker.note("e")
    assert "for another 10 s, after 3 failures in a row; the last: e" in breaker.refusal()
    clock.now = 10.0
    assert breaker.refusal() == ""
    assert "until one request has come back" in breaker.refusal()
    breaker.note("f")
    assert "for another 10 s, after 4 failures" in breaker.refusal()
    clock.now = 20.0
    assert breaker.refusal() == ""
    breaker.note("")
    assert breaker.refusal() == breaker.refusal() == ""


def test_a_breaker_of_no_failures_never_opens() -> None:
    breaker = Breaker(0, 10.0)
    for _ in range(50):
        breaker.note("failed")
    assert breaker.refusal() == ""


def test_a_judge_that_dies_is_left_alone_and_is_back_when_it_returns() -> None:
    down = [True]

    def answer(body: dict[str, Any], number: int) -> Reply:
        return Reply({}, status=500) if down[0] else tokens({"Yes": 0.9, "No": 0.1})

    with serving(answer) as stub:
        judge = YesNoReward(stub.client(retries=0, failures=3, cooldown_s=0.3, concurrency=1))
        first = judge.score([DRAWN] * 10)
        assert {score.status for score in first} == {"unavailable"} and len(stub.bodies) == 3
        assert "answered 500" in first[0].reason and "after 3 failures in a row" in first[9].reason
        down[0] = False
        assert judge.score([DRAWN])[0].status == "unavailable" and len(stub.bodies) == 3
        time.sleep(0.35)
        back = judge.score([DRAWN] * 4)
    assert [score.value for score in back] == pytest.approx([0.9] * 4)


def test_a_refused_request_is_an_answer_and_opens_nothing() -> None:
    with serving(Reply({"error": "too long"}, status=400)) as stub:
        judge = YesNoReward(stub.client(failures=2, concurrency=1))
        scores = judge.score([DRAWN] * 5)
    assert len(stub.bodies) == 5 and all("400" in score.reason for score in scores)


def test_rewards_with_one_address_share_its_limit() -> None:
    with serving(Reply(tokens({"Yes": 0.9}).payload, delay_s=0.1)) as stub:
        judges = [YesNoReward(stub.client(concurrency=concurrency)) for concurrency in (3, 8)]
        threads = [threading.Thread(target=judge.score, args=([DRAWN] * 8,)) for judge in judges]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(stub.bodies), stub.most_at_once) == (16, 3)
    with serving(Reply(tokens({"Yes": 0.9}).payload, delay_s=0.2)) as stub:
        YesNoReward(stub.client(concurrency=8)).score([DRAWN] * 8)
        assert stub.most_at_once > 3, "another address has its own"


def test_an_endpoint_raises_what_it_is_told_to() -> None:
    class Own(EndpointError):
        pass

    endpoint = Endpoint("http://127.0.0.1:9/", retries=0, timeout_s=2.0, failure=Own)
    with pytest.raises(Own, match="the connection to http://127.0.0.1:9/ failed"):
        endpoint.post("x", b"{}")
    with pytest.raises(Own):
        endpoint.get("x", 1.0)
