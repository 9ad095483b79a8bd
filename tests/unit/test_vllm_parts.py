"""Parts of the vLLM engine that need no vLLM: waves, the wire, the key, several hosts, recovery, starting a server."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from rlmm.cli import app
from rlmm.config.engines import VllmServerConfig
from rlmm.policies.causal import CausalPolicy
from rlmm.train.recovery import Recovering
from rollouts.contract import SEEN, EngineLost, Grid, Layout, Request
from rollouts.fingerprint import weights_fingerprint
from rollouts.law import Law
from rollouts.trajectory import Span, Trajectory
from rollouts.vllm_engine import guard
from rollouts.vllm_engine.drawn import Drawn
from rollouts.vllm_engine.engine import VllmEngine
from rollouts.vllm_engine.faults import memory_advice
from rollouts.vllm_engine.host import Room, Row
from rollouts.vllm_engine.launch import ServerPlan
from rollouts.vllm_engine.server import ServerHost, start_servers
from rollouts.vllm_engine.transfer import read_shards, write_shards
from rollouts.vllm_engine.waves import Sample, plan_waves

ROOT = Path(__file__).parents[2]
LAYOUT = Layout(vocab_size=9, text=(0, 4), image=(4, 9), bos=0, pad=1, boi=(2,), grid=Grid(1, 2))
ROOMY = Room(rows=100, prompt_tokens=1000, blocks=1000, length=64)


def samples(count: int, *lengths: int) -> list[Sample]:
    return [Sample(str(i), "a", f"a/{i}", tuple((1,) * n for n in lengths), i) for i in range(count)]


def sizes(room: Room, *lengths: int, count: int = 5) -> list[int]:
    return [len(wave) for wave in plan_waves(samples(count, *lengths), room, 30)]


def test_a_wave_is_what_fits_of_rows_prompt_tokens_and_blocks() -> None:
    assert sizes(ROOMY, 4, 3) == [5]
    assert sizes(Room(5, 1000, 1000, 64), 4, 3) == [2, 2, 1]  # two rows a sample
    assert sizes(Room(100, 21, 1000, 64), 4, 3) == [3, 2]  # seven prompt tokens a sample
    assert sizes(Room(100, 1000, 17, 64), 4, 3) == [2, 2, 1]  # 34 and 33 positions: 2 blocks each, and one to spare
    assert sizes(Room(100, 1000, 10, 64), 2, 2) == [2, 2, 1]  # 32 positions fill a block: 2 x (1 + 1)


@pytest.mark.parametrize(
    ("room", "says"),
    [
        (Room(1, 100, 100, 64), "needs 2 rows and the vllm engine has 1; raise engine.max_rows"),
        (Room(9, 6, 100, 64), "needs 7 prefix tokens and the vllm engine has 6; raise engine.max_prompt_tokens"),
        (Room(9, 100, 5, 64), "needs 6 KV blocks and the vllm engine has 5; raise engine.kv_megabytes"),
        (Room(9, 100, 2, 64), "needs 3 KV blocks and the vllm engine has 2"),
        (Room(9, 100, 100, 33), "34 positions and the engine has 33; raise engine.max_length"),
    ],
)
def test_a_sample_that_never_fits_is_an_error_that_names_the_size(room: Room, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sizes(room, 4, 3)


@pytest.mark.parametrize("support", [None, np.array([[1, 2], [255, 0], [7, 9]], np.uint8)])
def test_what_was_drawn_comes_whole_over_the_wire(support: np.ndarray | None) -> None:
    sent = Drawn(np.array([5, -1, 1 << 40]), np.array([-0.1, 0.0, -1e-300]), support, "parted")
    got = Drawn.from_wire(sent.to_wire())
    assert got.tokens_S.tolist() == [5, -1, 1 << 40] and got.logp_S.tolist() == [-0.1, 0.0, -1e-300]
    assert got.fault == "parted" and np.array_equal(cast(Any, got.support), cast(Any, support))


class FakeHost:
    """Draws the sample's seed as its first code and its number as the second; `wrong`: vLLM takes another token."""

    def __init__(self, room: Room = ROOMY, wrong: bool = False) -> None:
        self.room, self.wrong = room, wrong
        self.rows: list[Row] = []
        self.taken: list[str] = []
        self.abandoned = 0

    def run(self, rows: Sequence[Row], samples: Sequence[str]) -> tuple[list[list[int]], list[Drawn]]:
        self.rows += rows
        by_name = {row.arguments["sample"]: int(row.arguments["seed"]) for row in rows}
        drawn = [Drawn(np.array([4 + by_name[name] % 5, 4]), np.zeros(2), None) for name in samples]
        found = {name: one.tokens_S.tolist() for name, one in zip(samples, drawn, strict=True)}
        return [[8, 8] if self.wrong else found[row.arguments["sample"]] for row in rows], drawn

    def abandon(self) -> None:
        self.abandoned += 1

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.taken += [name for name, _ in weights]

    def forget(self) -> None:
        self.taken += ["forgot"]

    def fingerprint(self) -> str:
        return "/".join(self.taken)

    def close(self) -> None:
        self.taken = ["closed"]


def engine_of(*hosts: FakeHost, layout: Layout = LAYOUT) -> VllmEngine:
    return VllmEngine(layout, hosts, hosts[0].load)


def ask(engine: Any, guided: bool = True, seeds: int = 5) -> Trajectory:
    law = Law(LAYOUT.image, guidance_scale=3.0 if guided else 1.0)
    streams = {"cond": (0, 3, 3, 2), "uncond": (0, 2)}
    request = Request("a", streams, tuple(range(seeds)), tuple(f"a/{i}" for i in range(seeds)))
    return engine.generate([request], [Span("image", law, 2)])


def test_a_prompt_about_a_picture_to_be_seen_is_refused() -> None:
    request = Request("a", {"cond": (0, SEEN + 5, 2)}, (1,), ("a/0",))
    with pytest.raises(ValueError, match=r"sees through an encoder.*engine\.kind: vllm or torch"):
        engine_of(FakeHost()).generate([request], [Span("image", Law(LAYOUT.image), 2)])


def test_hosts_draw_equal_parts_in_order_and_forget_with_each_sync() -> None:
    hosts = [FakeHost(), FakeHost()]
    engine = engine_of(*hosts)
    made = ask(engine)
    assert made.ids[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert [len(host.rows) for host in hosts] == [6, 4]
    engine.sync(iter([("w", torch.zeros(1)), ("v", torch.zeros(1))]), 3)
    assert hosts[0].taken == ["w", "v", "forgot"] and hosts[1].taken == ["forgot"]
    assert ask(engine).weights_version == 3 and engine.fingerprint() == "forgot+w/v/forgot"
    hosts[1].taken = hosts[0].taken
    assert engine.fingerprint() == "w/v/forgot"


def test_servers_that_hold_their_weights_in_two_dtypes_are_no_engine() -> None:
    """Their weights would never be the trainer's, and the fingerprint could not say why."""
    with pytest.raises(ValueError, match="hold their weights as bfloat16 and float32.*start them with the same dtype"):
        engine_of(FakeHost(), FakeHost(replace(ROOMY, dtype="bfloat16")))


def test_the_rows_of_a_wave_say_how_many_they_are() -> None:
    host = FakeHost(Room(5, 100, 100, 64))
    ask(engine_of(host))
    waves = [tuple(row.arguments["wave"]) for row in host.rows]
    assert [count for _, count in waves] == [4] * 4 + [4] * 4 + [2] * 2
    assert len(set(waves)) == 3 and [row.arguments["streams"] for row in host.rows[:2]] == [["cond"], ["uncond"]]


def test_tokens_that_were_not_drawn_are_an_error_that_names_the_sample() -> None:
    with pytest.raises(RuntimeError, match=r"did not follow the draws of sample 'a/0' of group 'a', seed 0"):
        ask(engine_of(FakeHost(wrong=True)))


def test_two_engines_never_name_a_sample_alike() -> None:
    hosts = [FakeHost(), FakeHost()]
    for host in hosts:
        ask(engine_of(host))
    names = [{row.arguments["sample"] for row in host.rows} for host in hosts]
    assert not names[0] & names[1]


class Mortal:
    """An engine that is lost at given calls."""

    dtype, takes_adapters = torch.float32, False
    shown = weights_fingerprint([("fresh", torch.zeros(1))], torch.float32)

    def __init__(self, deaths: list[str]) -> None:
        self.deaths, self.calls = deaths, list[str]()

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.deaths:
            self.deaths.remove(name)
            raise EngineLost(f"gone in {name}")

    def generate(self, requests: Any, spans: Any) -> Any:
        self._call("generate")
        return "made"

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._call(f"sync {[name for name, _ in weights]} {version}")

    def fingerprint(self) -> str:
        self._call("fingerprint")
        return self.shown

    def close(self) -> None:
        self.calls.append("close")


class Weights:
    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        yield "fresh", torch.zeros(1)


def recovering(deaths: list[str]) -> tuple[Recovering, list[Mortal]]:
    built: list[Mortal] = []

    def build() -> Any:
        built.append(Mortal(deaths))
        return built[-1]

    return Recovering(build, cast(CausalPolicy, Weights())), built


@pytest.mark.parametrize("call", ["generate", "fingerprint", "sync ['given'] 4"])
def test_a_lost_engine_is_built_again_with_the_policys_weights_and_asked_again(call: str) -> None:
    engine, built = recovering([call])
    engine.sync(iter([("given", torch.zeros(1))]), 4)
    assert cast(Any, engine.generate([], [])) == "made" and engine.fingerprint() == Mortal.shown
    assert len(built) == 2 and built[0].calls[-2:] == [call, "close"]
    assert built[1].calls[:2] == ["sync ['fresh'] 4", "fingerprint"]


def test_an_engine_that_was_built_again_with_other_weights_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = recovering(["generate"])
    monkeypatch.setattr(Mortal, "shown", "others")
    with pytest.raises(RuntimeError, match=r"the engine's weights \(others\) are not the trainer's"):
        engine.generate([], [])


def test_a_second_loss_with_the_same_weights_is_raised_and_one_with_later_weights_is_not() -> None:
    engine, built = recovering(["generate"])
    engine.sync(iter([]), 1)
    engine.generate([], [])
    built[1].deaths.append("generate")
    with pytest.raises(EngineLost, match="lost twice with the same weights \\(version 1\\)"):
        engine.generate([], [])
    engine.sync(iter([]), 2)
    built[1].deaths.append("generate")
    engine.generate([], [])
    assert len(built) == 3


def through_the_guard(path: str, key: bytes | None) -> int | str:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        sent.append("inside")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message.get("status"))

    headers = [] if key is None else [(b"authorization", b"Bearer " + key)]
    asyncio.run(guard.KeyMiddleware(inner)({"type": "http", "path": path, "headers": headers}, None, send))
    return sent[0]


def test_every_path_but_health_wants_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(guard.KEY_VARIABLE, "secret")
    assert through_the_guard("/collective_rpc", b"secret") == "inside"
    assert through_the_guard("/collective_rpc", None) == through_the_guard("/v1/models", b"secre") == 401
    assert through_the_guard("/health", None) == "inside" and through_the_guard("/health/x", None) == 401
    monkeypatch.setenv(guard.KEY_VARIABLE, "")
    with pytest.raises(RuntimeError, match="is not set"):
        through_the_guard("/health", None)


def test_weights_are_written_in_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollouts.vllm_engine.transfer.SHARD_BYTES", 100)
    count = write_shards(((f"w{i}", torch.full((10,), float(i))) for i in range(7)), tmp_path)

    shards = [load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert [sorted(shard) for shard in shards] == [["w0", "w1", "w2"], ["w3", "w4", "w5"], ["w6"]]
    assert [(name, weight.tolist()) for name, weight in read_shards(tmp_path, count)] == [
        (f"w{i}", [float(i)] * 10) for i in range(7)
    ]


def test_a_server_is_stock_vllm_told_what_to_load() -> None:
    command = ServerPlan(Path("model"), max_length=9000, max_prompt_tokens=100, tensor_parallel=2).command(81)
    given = dict(zip(command, command[1:], strict=False))
    assert given["--max-num-batched-tokens"] == "9000" and given["--tensor-parallel-size"] == "2"
    assert given["--host"] == "127.0.0.1" and given["--port"] == "81" and given["--model"] == "model"
    assert "--enforce-eager" in command


BARE = """
import sys
from pathlib import Path
sys.modules["vllm"] = None
from rollouts.vllm_engine.launch import ServerPlan
print(*ServerPlan(Path("model"), max_length=9).command(81))
"""


def test_a_servers_command_is_written_without_vllm() -> None:
    made = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True)
    assert "--worker-cls rollouts.vllm_engine.device.DeviceWorker" in made.stdout, made.stderr


def test_what_is_served_is_served_to_this_machine_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("rlmm.rollout_server.serve_rollouts", lambda model, host, *_: told.append(host))
    monkeypatch.setattr("rlmm.reward_server.serve_reward", lambda name, options, host, *_: told.append(host))
    for command in (["rollout-server", "model"], ["reward", "serve", "scenes"]):
        for more in ([], ["--host", "0.0.0.0"]):
            assert CliRunner().invoke(app, [*command, *more]).exit_code == 0
    assert told == ["127.0.0.1", "0.0.0.0"] * 2


def test_a_server_may_compile_its_model() -> None:
    config = VllmServerConfig(enforce_eager=False)
    assert "--enforce-eager" not in ServerPlan(Path("m"), max_length=9, enforce_eager=config.enforce_eager).command(81)


CHILD = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from rollouts.vllm_engine import launch

class Sleeper(launch.ServerPlan):
    def command(self, port):
        return ["sleep", "600"]

server = launch.Server(Sleeper(Path("."), max_length=1))
print(server.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_a_server_ends_with_a_trainer_that_was_killed() -> None:
    killed = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True)
    server = Path("/proc") / killed.stdout.strip() / "stat"
    end = time.monotonic() + 10
    while server.exists() and server.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert killed.returncode == -9 and (not server.exists() or server.read_text().split()[2] == "Z")


def test_a_server_that_dies_at_its_start_shows_the_end_of_its_log() -> None:
    class Broken(ServerPlan):
        def command(self, port: int) -> list[str]:
            return [sys.executable, "-c", "raise SystemExit('no such device')"]

    with pytest.raises(EngineLost, match=r"ended with status 1:\nno such device"):
        start_servers(Broken(Path("model"), max_length=1), 1, 60)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("ValueError: Available memory on node 0 (1.0/2.0 GiB) on kv cache allocation is less than requested memory "
         "for kv (9.0 GiB). Decrease --kv-cache-memory-bytes", "lower engine.kv_megabytes"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "lower engine.kv_megabytes"),
        ("ValueError: 2.0 GiB KV cache is needed, which is larger than the available KV cache memory (1.0 GiB)",
         "raise engine.kv_megabytes"),
    ],
)  # fmt: skip
def test_a_server_that_dies_for_memory_names_the_setting(said: str, advice: str) -> None:
    class Full(ServerPlan):
        def command(self, port: int) -> list[str]:
            return [sys.executable, "-c", f"print({said!r}, *['later'] * 30, sep='\\n'); raise SystemExit(1)"]

    longest = r"the longest request has 131072 positions \(engine\.max_length\)"
    with pytest.raises(EngineLost, match=rf"ended with status 1 \(.*{advice}.*; {longest}\):"):
        start_servers(Full(Path("model"), max_length=131072), 1, 60)


def test_what_a_log_says_of_memory_that_sufficed_is_no_advice() -> None:
    assert memory_advice("INFO GPU KV cache size: 4,096 tokens\nRuntimeError: no such device", 9) is None


def test_streams_travel_together_only_where_the_unconditional_one_is_a_function_of_the_tokens() -> None:
    layout = replace(LAYOUT, null_token=1)
    host = FakeHost(replace(ROOMY, streams=2))
    engine = engine_of(host, layout=layout)
    ask(engine)  # its unconditional prefix is shorter
    assert [row.arguments["streams"] for row in host.rows[:2]] == [["cond"], ["uncond"]]
    host.rows.clear()
    law = Law(LAYOUT.image, guidance_scale=3.0)
    request = Request("a", {"cond": (0, 3, 3, 2), "uncond": (0, 1, 1, 2)}, (1, 2), ("x", "y"))
    engine.generate([request], [Span("image", law, 2)])
    assert [row.arguments["streams"] for row in host.rows] == [["cond", "uncond"]] * 2
    assert all(row.arguments["wave"] is None and row.prefix == (0, 3, 3, 2) for row in host.rows)


def test_the_null_prompt_is_one_of_its_own_or_the_prompt_token_by_token() -> None:
    assert replace(LAYOUT, null_prompt=(3,)).null([1, 1, 1]) == (3,)
    assert replace(LAYOUT, null_prompt=(3,), null_token=1).null([3, 3, 3]) == (1, 1, 1)


def test_an_engines_weights_are_compared_in_the_dtype_it_holds_them_in() -> None:
    weight = torch.tensor([1.0, 1.001])
    held = [("w", weight.bfloat16())]
    assert weights_fingerprint(held) == weights_fingerprint([("w", weight)], torch.bfloat16)
    assert weights_fingerprint(held) != weights_fingerprint([("w", weight)])


class Answering(BaseHTTPRequestHandler):
    """A server that answers paths with a status of the test's choosing, and knows what it was asked."""

    statuses: ClassVar[dict[str, int]] = {}
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        Answering.asked.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        room = {"rows": 4, "prompt_tokens": 64, "blocks": 9, "length": 64, "streams": 1, "dtype": "float32"}
        self.send_response(Answering.statuses.get(self.path, 200))
        self.end_headers()
        self.wfile.write(json.dumps({"results": [room]}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (503, EngineLost, "failed at /inference/v1/generate with 503"),
        (404, RuntimeError, "refused /inference/v1/generate with 404.*rlmm rollout-server"),
    ],
)
def test_a_refused_row_is_one_error_and_the_others_are_given_up(status: int, error: type[Exception], says: str) -> None:
    caught = refused_rollout({"/inference/v1/generate": status}, error, says)
    assert type(caught) is error and not getattr(caught, "__notes__", [])
    assert Answering.asked.count("/abort_requests") == 1  # a row given up may still arrive after it


@pytest.mark.parametrize("status", [404, 503])
def test_rows_that_cannot_be_given_up_do_not_hide_what_went_wrong_first(status: int) -> None:
    caught = refused_rollout({"/inference/v1/generate": 400, "/abort_requests": status}, RuntimeError, "with 400")
    (note,) = caught.__notes__
    assert type(caught) is RuntimeError and f"/abort_requests with {status}" in note


def refused_rollout(statuses: dict[str, int], error: type[Exception], says: str) -> Exception:
    Answering.statuses, Answering.asked = statuses, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        host = ServerHost(f"http://127.0.0.1:{served.server_port}", token="x")
        with pytest.raises(error, match=says) as caught:
            host.run([Row((1, 2), {}, 3)] * 3, ["a", "b", "c"])
        host.close()
        served.shutdown()
    return caught.value
