"""A reward behind a real server on this machine: the same scores as here, the token, and what fails how."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from typer.testing import CliRunner

from rewards import build
from rewards.base import Reward, Sample, Score, SeesGroups
from rewards.gold import HasGold, gold_check_pairs
from rewards.guards import not_blank
from rewards.remote import RemoteError, RemoteReward
from rewards.runner import RewardRunner
from rewards.scenes import ScenesReward
from rewards.service import build_app
from rewards.wire import WireError, WireSample, WireScore, read_png, read_sample, read_score, send_sample, send_score
from rlmm.cli import app as command

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef-secret"
NOISE = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
ONE, TWO, THREE = (Image.fromarray(pixels) for pixels in NOISE)


class Reads:
    """A reward that scores by what it is told, and keeps what it was sent. `answer` may raise."""

    name = "reads"

    def __init__(self, answer: Callable[[Sequence[Sample]], Any]) -> None:
        self.answer, self.seen, self.identity, self.most, self._now = answer, [], "v1", 0, 0  # type: ignore[var-annotated]

    def fingerprint(self) -> str:
        return self.identity

    def score(self, samples: Sequence[Sample]) -> Any:
        self._now += 1
        self.most = max(self.most, self._now)
        self.seen.extend(samples)
        try:
            return self.answer(samples)
        finally:
            self._now -= 1


@contextmanager
def serving(reward: Reward, **settings: Any) -> Iterator[str]:
    """A served reward's address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(build_app(reward, TOKEN, **settings), log_level="critical")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLMM_REWARD_TOKEN", TOKEN)


def remote(url: str, **options: Any) -> RemoteReward:
    reward = build("remote", url=url, **{"backoff_s": 0.0, **options})
    assert isinstance(reward, RemoteReward)
    return reward


def full() -> Sample:
    row = {"a": 1, "b": [1.5, None, {"c": "d"}], "n": np.float32(0.5), "v": np.arange(3), "yes": True}
    return Sample("id", "gr", 'pr\u00fcfe "x"', (ONE, TWO), "text", (THREE,), (TWO,), ("right", "also"), row)


def test_a_sample_arrives_as_it_was_sent() -> None:
    reward = Reads(lambda samples: [Score.ok(0.25, part=2.0)] * len(samples))
    with serving(reward) as url:
        (score,) = remote(url).score([full()])
    (seen,) = reward.seen
    assert score == Score.ok(0.25, part=2.0)
    assert (seen.sample_id, seen.group_id, seen.prompt, seen.text) == ("id", "gr", 'pr\u00fcfe "x"', "text")
    for kind in ("images", "source_images", "target_images"):
        sent, arrived = (getattr(sample, kind) for sample in (full(), seen))
        assert len(sent) == len(arrived) and all(np.array_equal(a, b) for a, b in zip(sent, arrived, strict=True))
    assert seen.target_texts == ("right", "also")
    assert seen.row == {"a": 1, "b": [1.5, None, {"c": "d"}], "n": 0.5, "v": [0, 1, 2], "yes": True}


def test_the_three_answers_and_their_reasons_travel() -> None:
    answers = [
        Score("ok", 0.1, "because", {"x": 1.0}),
        Score.unavailable("gone"),
        Score.invalid_output("torn"),
        None,
        0.7,
    ]
    reward = Reads(lambda samples: answers)
    with serving(reward) as url:
        scores = remote(url).score([full()] * 5)
    assert scores == [*answers[:3], Score.unavailable("not applicable"), Score.ok(0.7)]


def test_scenes_and_gold_pairs_are_the_same_there_and_here() -> None:
    here = ScenesReward()
    samples = [sample for pair in here.gold() for sample in (pair.good, pair.bad)]
    with serving(here) as url:
        there = remote(url)
        assert there.score(samples) == here.score(samples)
        assert there.name == "scenes" and here.fingerprint() in there.fingerprint()
        assert isinstance(there, HasGold) and gold_check_pairs(there, there.gold()).passed
        assert len(there.gold()) == len(here.gold())


def test_a_reward_that_sees_groups_sees_them_over_the_wire() -> None:
    def copy(name: str, group: str, image: Image.Image) -> Sample:
        return Sample(name, group, "p", (image,))

    samples = [copy("1", "a", ONE), copy("2", "b", ONE), copy("3", "a", ONE), copy("4", "b", TWO)]
    with serving(build("distinct")) as url:
        there = remote(url)
        assert isinstance(there, SeesGroups)
        scores = RewardRunner(there, batch_size=1, cache=9).score(samples)
    assert [score.value for score in scores] == [0, 1, 0, 1]
    with serving(not_blank()) as url:
        assert not isinstance(remote(url), SeesGroups)


def raises(samples: Sequence[Sample]) -> Any:
    raise OSError("no disk")


def test_a_reward_that_fails_there_is_unavailable_here() -> None:
    with serving(Reads(raises)) as url:
        (score,) = remote(url).score([full()])
    assert score.status == "unavailable" and "no disk" in score.reason


def test_a_reward_that_breaks_its_contract_there_is_unavailable_here_and_not_asked_again() -> None:
    reward = Reads(lambda samples: [0.5] * (len(samples) + 1))
    with serving(reward) as url:
        with pytest.raises(RemoteError, match="2 scores for 1 samples"):
            remote(url).score([full()])
        (score,) = RewardRunner(remote(url), retries=0).score([full()])
    assert score.status == "unavailable" and len(reward.seen) == 2


def test_what_cannot_be_sent_costs_no_other_sample_its_score() -> None:
    broken = Image.new("RGB", (0, 2))
    samples = [
        Sample("a", "g", "p", (broken,)),
        Sample("b", "g", "p", (ONE,), source_images=(broken,)),
        Sample("c", "g", "p", (ONE,), row={"x": object()}),
        Sample("d", "g", "p", (ONE,), row={"x": float("nan")}),
        Sample("e", "g", "p", (ONE,), row={"x": 1}),
    ]
    reward = Reads(lambda samples: [1.0] * len(samples))
    with serving(reward) as url:
        scores = remote(url).score(samples)
        some = remote(url, columns=["y"]).score(samples[2:4])
    assert [score.status for score in scores] == ["invalid_output", "unavailable", "unavailable", "unavailable", "ok"]
    assert "columns" in scores[2].reason and "nan is no JSON" in scores[3].reason
    assert [score.value for score in some] == [1, 1] and reward.seen[-1].row == {}


def test_another_reward_in_its_place_is_refused() -> None:
    reward = Reads(lambda samples: [1.0])
    with serving(reward) as url:
        there = remote(url)
        reward.identity = "v2"
        with pytest.raises(RemoteError, match="serves another reward"):
            there.score([full()])
        assert remote(url).fingerprint() != there.fingerprint()


@pytest.mark.parametrize("given", ["", "Bearer wrong", f"Bearer {TOKEN}x", TOKEN, "Bearer \u00e9"])
def test_nothing_is_told_without_the_token(given: str) -> None:
    reward = Reads(lambda samples: [1.0])
    with serving(reward) as url:
        headers: Any = {"Authorization": given.encode("latin-1")} if given else {}
        answers = [httpx.get(f"{url}/v1/reward", headers=headers), httpx.post(f"{url}/v1/score", headers=headers)]
        answers.append(httpx.get(f"{url}/docs", headers=headers))
        assert [answer.status_code for answer in answers] == [401] * 3 and "reads" not in answers[0].text
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert reward.seen == []


def body(**changes: Any) -> dict[str, Any]:
    sent = send_sample(full())
    assert isinstance(sent, WireSample)
    return {"protocol": 1, "samples": [sent.model_dump() | changes]}


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (body(), 200),
        (body() | {"protocol": 2}, 422),
        (body() | {"more": 1}, 422),
        (body(extra=1), 422),
        (body(images=["no base64!"]), 422),
        (body(images=["AAAA"]), 422),
        (body(images=[{"url": "file:///etc/passwd"}]), 422),
        ([], 422),
    ],
)
def test_a_wrong_request_is_refused(given: Any, status: int) -> None:
    with serving(Reads(lambda samples: [1.0])) as url:
        answer = httpx.post(f"{url}/v1/score", json=given, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == status, answer.text


def test_a_request_that_is_too_long_is_refused_before_it_is_read() -> None:
    with serving(Reads(lambda samples: [1.0]), max_megabytes=1) as url:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        long = httpx.post(f"{url}/v1/score", content=b" " * (1 << 20) + b" ", headers=headers)
        unsaid = httpx.post(f"{url}/v1/score", content=iter([b"{}"]), headers=headers)
    assert (long.status_code, unsaid.status_code) == (413, 411)


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (3, 3)])
def test_the_server_scores_so_many_requests_at_once(concurrency: int, most: int) -> None:
    def slow(samples: Sequence[Sample]) -> Any:
        time.sleep(0.2)
        return [1.0]

    reward = Reads(slow)
    with serving(reward, concurrency=concurrency) as url:
        there = remote(url, concurrency=8)
        threads = [threading.Thread(target=there.score, args=([full()],)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(reward.seen) == 3 and reward.most == most


def test_a_server_that_is_gone_and_returns() -> None:
    reward = Reads(lambda samples: [0.5] * len(samples))
    with serving(reward) as url:
        there = remote(url, retries=1)
        runner = RewardRunner(there, retries=0)
        assert runner.score([full()])[0].value == 0.5
    (score,) = runner.score([full()])
    assert score.status == "unavailable" and "(2 tries)" in score.reason
    with pytest.raises(RemoteError, match="no reward is served at .*rlmm reward serve"):
        remote(url)


def test_a_server_that_is_no_served_reward_and_a_wrong_token_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(not_blank()) as url:
        with pytest.raises(RemoteError, match="404"):
            remote(url + "/elsewhere")
        monkeypatch.setenv("OTHER", "a-token-of-another-server")
        with pytest.raises(RemoteError, match="answered 401.*token_env"):
            remote(url, token_env="OTHER")
    monkeypatch.delenv("RLMM_REWARD_TOKEN")
    with pytest.raises(ValueError, match="RLMM_REWARD_TOKEN is not set"):
        build("remote", url="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8900"}, "no server's address"),
        ({"url": "http://user:secret@host"}, "no server's address"),
        ({"url": "http://127.0.0.1:9", "concurrency": 0}, "concurrency >= 1"),
        ({"url": "http://127.0.0.1:9", "colums": []}, "Nearest: columns"),
    ],
)
def test_options_that_cannot_work_say_why(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build("remote", **options)
    assert "secret" not in str(caught.value)


def test_weak_tokens_and_scores_that_contradict_themselves_are_refused() -> None:
    for weak in ("", "short", "with a space in it all"):
        with pytest.raises(ValueError, match="16 characters"):
            build_app(not_blank(), weak)
    for status, value in (("ok", None), ("unavailable", 0.5), ("invalid_output", 0.0)):
        with pytest.raises(WireError, match=f"status {status}"):
            read_score(WireScore.model_validate({"status": status, "value": value}))
    assert send_score(Score("ok", 1.0, parts={"a": float("inf"), "b": 2.0})).parts == {"b": 2.0}
    jpeg = "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkS"
    with pytest.raises(WireError, match="no PNG"):
        read_png(jpeg)
    sent = send_sample(full())
    assert isinstance(sent, WireSample) and read_sample(sent).row["a"] == 1


def awaited(process: "subprocess.Popen[bytes]", url: str) -> RemoteReward:
    """The reward that a process serves, as soon as it does."""
    deadline = time.monotonic() + 180
    while True:
        try:
            return remote(url)
        except RemoteError:
            assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)


def test_the_command_serves_a_reward_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def bright(samples, scale=1.0):\n"
        "    return [scale * s.images[0].convert('L').getpixel((0, 0)) / 255 for s in samples]\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["reward", "serve", f"{tmp_path / 'own.py'}:bright", "scale=0.5", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "rlmm.cli", *arguments], cwd=tmp_path, env=environment)
    try:
        there = awaited(process, f"http://127.0.0.1:{port}")
        samples = [Sample("s", "g", "p", (Image.new("RGB", (2, 2), color),)) for color in ("white", "black")]
        scores = there.score(samples)
    finally:
        process.terminate()
        process.wait(10)
    assert [score.value for score in scores] == [0.5, 0] and there.name == "bright"


def test_the_command_says_what_is_wrong_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["ocrr"], "Nearest: ocr"),
        (["ocr", "height"], "key=value"),
        (["not_blank", "x=1"], "no option 'x'"),
    ):
        result = CliRunner().invoke(command, ["reward", "serve", *arguments])
        assert result.exit_code == 1 and message in str(result.exception)
    monkeypatch.delenv("RLMM_REWARD_TOKEN")
    result = CliRunner().invoke(command, ["reward", "serve", "not_blank"])
    assert "RLMM_REWARD_TOKEN is not set" in str(result.exception)


def test_a_served_reward_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import rewards.service, rewards.remote, rewards; rewards.build('scenes')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
