"""The judge's client: addresses, key, what is tried again and what is not, and the check at the start."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from rewards import endpoint as client_module
from rewards.verifier.client import CHECK_S, Client
from rewards.verifier.errors import JudgeError
from rewards.verifier.prompts import messages
from rewards.verifier.server import Server
from rewards.verifier.views import View, data_url
from tests.unit.test_verifier_stub import MODEL, Reply, Stub, says, serving

PIXEL = data_url(Image.new("RGB", (1, 1)))
SECRET = "sk-very-secret-123"


def ask(client: Client) -> str:
    return client.chat(messages(View("a cat", (PIXEL,)), "?"), 5).text


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", slept.append)
    return slept


def nobody() -> str:
    """An address on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_url_may_end_with_v1_or_a_slash_or_neither(end: str) -> None:
    with serving(says("hello")) as stub:
        client = stub.client(url=stub.url + end)
        client.check()
        assert ask(client) == "hello"
    assert stub.paths == ["/v1/models", "/v1/chat/completions"]


def test_a_path_before_v1_is_kept() -> None:
    assert Server("https://host/judge/", MODEL).base == "https://host/judge/v1"


def test_extra_body_joins_every_request() -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    with serving(says("a")) as stub:
        ask(stub.client(extra_body=extra))
    assert stub.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert (stub.bodies[0]["model"], stub.bodies[0]["max_completion_tokens"]) == (MODEL, 5)


def test_the_key_comes_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{SECRET}\n")
    with serving(says("a")) as stub:
        client = stub.client(api_key_env="JUDGE_KEY")
        client.check()
        ask(client)
        ask(stub.client())
    assert stub.keys == [f"Bearer {SECRET}"] * 2 + [None]


def test_a_missing_key_is_an_error_that_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="variable JUDGE_KEY, which is not set: export it"):
        Client(Server("http://a", MODEL, "JUDGE_KEY"))
    monkeypatch.setenv("JUDGE_KEY", " ")
    with pytest.raises(ValueError, match="which is empty"):
        Client(Server("http://a", MODEL, "JUDGE_KEY"))


def test_a_key_stands_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name of an environment variable") as raised:
        Server("http://a", MODEL, SECRET)
    assert SECRET not in str(raised.value)
    monkeypatch.setenv("JUDGE_KEY", f"{SECRET} two")
    with pytest.raises(ValueError, match="JUDGE_KEY has a space") as raised:
        Client(Server("http://a", MODEL, "JUDGE_KEY"))
    assert SECRET not in str(raised.value)
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    with serving(Reply({"error": f"bad key {SECRET}"}, status=401)) as stub:
        with pytest.raises(JudgeError, match=r"answered 401 .*bad key \*\*\*"):
            ask(stub.client(api_key_env="JUDGE_KEY"))


@pytest.mark.parametrize("failure", [Reply({}, status=500), Reply({}, status=503), Reply(drop=True), Reply({}, 429)])
def test_a_failure_that_may_pass_is_tried_again(failure: Reply) -> None:
    with serving([failure, failure, says("at last")]) as stub:
        assert ask(stub.client(retries=2)) == "at last"
    assert len(stub.bodies) == 3


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize(("status", "said"), [(500, "answered 500"), (429, "answered 429")])
def test_tries_are_bounded(status: int, said: str, retries: int) -> None:
    with serving(Reply({"error": "busy"}, status=status)) as stub:
        tries = "1 try" if retries == 0 else "3 tries"
        with pytest.raises(JudgeError, match=rf"{said}.*busy.*\({tries}\)"):
            ask(stub.client(retries=retries))
    assert len(stub.bodies) == 1 + retries


def test_a_refused_connection_is_tried_again_and_then_named(waits: list[float]) -> None:
    client = Client(Server(nobody(), MODEL, retries=3, backoff_s=0.5))
    with pytest.raises(JudgeError, match=r"connection to http://127.0.0.1:\d+/v1 failed: ConnectError.*4 tries"):
        ask(client)
    assert waits == [0.5, 1.0, 2.0]


def test_the_server_may_say_how_long_to_wait_up_to_a_limit(waits: list[float]) -> None:
    said = [Reply({}, 429, {"Retry-After": after}) for after in ("7", "3600", "Wed, 21 Oct 2026 07:28:00 GMT")]
    with serving([*said, says("a")]) as stub:
        ask(stub.client(backoff_s=0.5))
    assert [wait for wait in waits if wait] == [7, 30, 2]


@pytest.mark.parametrize("status", [307, 400, 401, 404, 422])
def test_a_refused_request_is_not_tried_again(status: int) -> None:
    with serving(Reply({"error": "too many images"}, status=status, headers={"Location": "/v1/models"})) as stub:
        with pytest.raises(JudgeError, match=rf"answered {status} .*too many images"):
            ask(stub.client())
    assert len(stub.bodies) == 1


def test_a_late_answer_is_not_asked_for_again() -> None:
    with serving(Reply(says("a").payload, delay_s=4.0)) as stub:
        with pytest.raises(JudgeError, match=r"within 1.0 s \(ReadTimeout\); raise timeout_s"):
            ask(stub.client(timeout_s=1.0))
    assert len(stub.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(raw=b"<html>proxy</html>"), "answered no JSON: '<html>proxy"),
        (Reply(raw=b"\xff\xfe"), "answered no JSON"),
        (Reply({"error": "no"}), "no choices"),
        (Reply([]), "no choices"),
        (Reply({"choices": []}), "no choices"),
        (Reply({"choices": [{"message": None}]}), "no choices"),
    ],
)
def test_an_answer_of_another_form_is_an_error(reply: Reply, message: str) -> None:
    with serving(reply) as stub, pytest.raises(JudgeError, match=message):
        ask(stub.client())


def test_no_more_requests_are_under_way_than_allowed() -> None:
    with serving(Reply(says("a").payload, delay_s=0.2)) as stub:
        client = stub.client(concurrency=3)
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(lambda _: ask(client), range(12))) == ["a"] * 12
    assert stub.most_at_once == 3


def failing(stub: Stub, **settings: Any) -> str:
    started = time.monotonic()
    with pytest.raises(JudgeError) as raised:
        stub.client(**settings).check()
    assert time.monotonic() - started < 2 * CHECK_S
    return str(raised.value)


def test_the_check_names_the_models_that_are_served() -> None:
    with serving(says("a")) as stub:
        text = failing(stub, model="org/judge-8b")
        assert f"{stub.url}/v1 does not serve the model 'org/judge-8b'" in text
        assert f"it serves: {MODEL}, org/other. Set the option model" in text
        stub.models = [f"m{number}" for number in range(40)] + ["org/judge-9b"]
        text = failing(stub, model="org/judge-8b")
        assert "m9 and 31 more. Nearest: org/judge-9b." in text and "m10" not in text
        stub.models = []
        assert "it serves: none" in failing(stub)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply({}, status=401), "refuses a request without a key (status 401)"),
        (Reply({}, status=404), "Is url the address of an OpenAI-compatible server?"),
        (Reply({}, status=500), "answered 500"),
        (Reply(raw=b"hello"), "answered no JSON"),
        (Reply({"data": "x"}), "it serves: none"),
        (Reply({"data": [7]}), "it serves: none"),
        (Reply({}, delay_s=4.0), "cannot be reached (ReadTimeout"),
    ],
)
def test_the_check_says_what_is_wrong_with_the_server(reply: Reply, message: str) -> None:
    with serving(says("a")) as stub:
        stub.models_reply = reply
        assert message in failing(stub, timeout_s=1.0)


def test_the_check_of_a_server_that_is_not_there_says_how_to_start_it() -> None:
    with pytest.raises(JudgeError, match=rf"cannot be reached \(ConnectError.*vllm serve {MODEL}`, or mend"):
        Client(Server(nobody(), MODEL)).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "no server's address; expected one such as http://127"),
        ({"url": "http://"}, "no server's address"),
        ({"url": "http://host:eighty"}, "eighty"),
        ({"url": "http://a?b=1"}, "no server's address"),
        ({"url": "http://me:pass@host"}, "holds a user or password"),
        ({"url": None}, "url is a NoneType; expected str"),
        ({"model": ""}, "model is empty"),
        ({"timeout_s": 0}, "above 0"),
        ({"timeout_s": float("inf")}, "above 0"),
        ({"timeout_s": "60"}, "timeout_s is a str; expected int or float"),
        ({"backoff_s": -1}, "at least 0"),
        ({"retries": -1}, "at least 0"),
        ({"retries": True}, "retries is a bool"),
        ({"concurrency": 0}, "at least 1"),
        ({"extra_body": {"temperature": 1}}, "'temperature', which the reward itself sends"),
        ({"extra_body": {"a": object()}}, "cannot be sent as JSON"),
        ({"extra_body": {"a": float("nan")}}, "cannot be sent as JSON"),
        ({"extra_body": [1]}, "extra_body is a list"),
    ],
)
def test_settings_that_cannot_work_say_why(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"url": "http://a", "model": MODEL}
    with pytest.raises(ValueError, match=message):
        Server(**{**given, **settings})
