"""A real judge in the loop: vLLM's OpenAI server with a tiny multimodal model, asked over a socket by the rewards."""

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Idefics3ForConditionalGeneration

from rewards import build
from rewards.base import Sample, Score
from rewards.runner import RewardRunner
from rewards.verifier.answers import Answer
from rewards.verifier.client import Client
from rewards.verifier.errors import JudgeError
from rlmm.config.recipe import Recipe
from rlmm.pipeline import run_recipe
from rlmm.train.metrics import MetricsFile
from rollouts.store import read_trajectory
from rollouts.vllm_engine.launch import Server, ServerPlan
from tests.integration.tiny_judge import VOCABULARY, WRITING, write_judge
from tests.unit.test_verifier_stub import pictures, serving, tokens

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
MODEL, KEY = "org/judge-7b", "TINY_JUDGE_KEY"


class JudgePlan(ServerPlan):
    """The stock server of `vllm serve`, by its module: the CPU build's own command looks for the package `vllm` and
    fails. Nothing of this package is in it."""

    def command(self, port: int) -> list[str]:
        return [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder),
            "--served-model-name", MODEL, "--host", self.host, "--port", str(port), "--dtype", self.dtype,
            "--max-model-len", str(self.max_length), "--max-num-seqs", str(self.max_rows),
            "--kv-cache-memory-bytes", str(self.kv_bytes), "--block-size", "32", "--enforce-eager",
            "--skip-mm-profiling", "--disable-log-stats", "--disable-uvicorn-access-log",
        ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_judge(tmp_path_factory.mktemp("judge"))


@contextmanager
def judging(folder: str) -> Iterator[str]:
    """The address of a server of the model in a folder; its key is in the environment."""
    server = Server(JudgePlan(Path(folder), 1024, max_rows=4, kv_bytes=1 << 24))
    try:
        server.wait(600)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(KEY, server.token)
            yield server.url
    finally:
        server.stop()


@pytest.fixture(scope="module")
def url(folder: str) -> Iterator[str]:
    with judging(folder) as found:
        yield found


def samples() -> list[Sample]:
    chance = np.random.default_rng(0)
    noise = [Image.fromarray(chance.integers(0, 256, (24, 20, 3), np.uint8)) for _ in range(3)]
    plain = [Image.new("RGB", (16, 16), name) for name in ("red", "white")]
    return [Sample(str(at), "g", "a cat and 3 dogs", (image,)) for at, image in enumerate(noise + plain)]


def asked(name: str, sample: Sample, **options: Any) -> dict[str, Any]:
    """The one request that a reward makes for a sample, as a stub server sees it."""
    with serving(tokens({"Yes": 1.0})) as stub:
        build(name, url=stub.url, model=MODEL, **options).score([sample])
    (body,) = stub.bodies
    return body


@torch.no_grad()
def chances(folder: str, body: Mapping[str, Any]) -> dict[str, float]:
    """Token -> its probability as a request's first answer, by transformers alone."""
    model, processor = Idefics3ForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    said = [
        {**message, "content": [{"type": "image"} if "image_url" in part else part for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in body["messages"]
    ]
    text = processor.apply_chat_template(said, tokenize=False)
    # The template writes the first token itself.
    given = processor(text=text, images=pictures(body), return_tensors="pt", add_special_tokens=False)
    logits = model(**given).logits[0, -1].double()
    return dict(zip(VOCABULARY, logits.softmax(-1).tolist(), strict=True))


def scores(name: str, url: str, **options: Any) -> list[Score]:
    return RewardRunner(build(name, url=url, model=MODEL, api_key_env=KEY, check=True, **options)).score(samples())


def test_yes_over_no_is_that_of_transformers(url: str, folder: str) -> None:
    given = scores("yes_no", url, min_mass=1e-6)
    for score, sample in zip(given, samples(), strict=True):
        chance = chances(folder, asked("yes_no", sample, min_mass=1e-6))
        yes, no = chance["Yes"] + chance["yes"], chance["No"]
        assert score.status == "ok", score.reason
        assert score.value == pytest.approx(yes / (yes + no), rel=1e-3)
        assert score.parts["mass"] == pytest.approx(yes + no, rel=1e-3)
    assert np.std([score.value for score in given if score.value is not None]) > 1e-3, "the judge looks at the pictures"


def test_an_expected_digit_is_that_of_transformers(url: str, folder: str) -> None:
    only = {"criteria": [{"name": "success"}], "min_mass": 1e-6}
    for score, sample in zip(scores("expected_score", url, **only), samples(), strict=True):
        chance = chances(folder, asked("expected_score", sample, **only))
        mass = math.fsum(chance[digit] for digit in "0123456789")
        wanted = math.fsum(int(digit) * chance[digit] for digit in "0123456789") / mass / 9
        # A judge that goes on with another digit has answered a number of two digits.
        assert (
            score.value == pytest.approx(wanted, rel=1e-3) if score.status == "ok" else "several digits" in score.reason
        )


def test_grpo_trains_on_what_the_judge_says(url: str, variant: Callable[..., Recipe]) -> None:
    options = f"{{url: '{url}', model: {MODEL}, api_key_env: {KEY}, min_mass: 1.0e-6}}"
    rewards = f"rewards={{terms: [{{name: yes_no, options: {options}}}]}}"
    run = run_recipe(variant(rewards, "stages.grpo.steps=4", "stages.grpo.held_out_every=0"), lambda line: None)
    logged = MetricsFile(run.stage("grpo") / "metrics.jsonl").read()
    rows = logged[::2]  # two updates a rollout
    assert len(rows) == 2 and all(row["sample/unavailable_share"] == 0 for row in rows)
    assert all(0 < row["reward/mean"] < 1 and row["reward/std"] > 0 and row["grad_norm"] > 0 for row in rows)
    made, columns = read_trajectory(run.stage("grpo") / "rollouts" / "step-000000.parquet")
    again = [
        Sample(name, "g", prompt, (Image.open(BytesIO(image)),))
        for name, prompt, image in zip(made.sample_id, columns["prompt"], columns["image"], strict=True)
    ]
    judge = build("yes_no", url=url, model=MODEL, api_key_env=KEY, min_mass=1e-6)
    asked_alone = [score.value for score in RewardRunner(judge).score(again[:4])]
    assert columns["reward"][:4] == pytest.approx(asked_alone, rel=1e-3)


def test_a_judge_that_does_not_answer_the_question_is_unavailable(url: str) -> None:
    for score in scores("yes_no", url, min_mass=0.999):
        assert score.status == "unavailable" and score.value is None and "below min_mass 0.999" in score.reason


def test_the_server_says_what_it_serves_and_refuses_what_it_cannot(url: str) -> None:
    with pytest.raises(JudgeError, match="does not serve the model 'org/other'.*org/judge-7b"):
        build("yes_no", url=url, model="org/other", api_key_env=KEY, check=True)
    with pytest.raises(JudgeError, match="refuses a request without a key"):
        build("yes_no", url=url, model=MODEL, check=True)
    (score,) = build("yes_no", url=url, model="org/other", api_key_env=KEY, retries=0, check=False).score(samples()[:1])
    assert score.status == "unavailable" and "404" in score.reason


def test_marks_as_json_by_a_schema_are_what_the_judge_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model under the schema's grammar ends its object, or writes until it is cut off."""
    answers: list[Answer] = []
    chat = Client.chat

    def noted(self: Client, *given: Any, **options: Any) -> Answer:
        answers.append(chat(self, *given, **options))
        return answers[-1]

    monkeypatch.setattr(Client, "chat", noted)
    seen: list[str] = []
    with judging(write_judge(tmp_path, 0, WRITING)) as url:
        for name in ("success", "faithful", "dull"):
            only = {"name": name} if name == "success" else {"name": name, "low": "it is not", "high": "it is"}
            options = {"criteria": [only], "max_tokens": 64, "reasks": 0, "concurrency": 1}
            for score, answer in zip(scores("rubric", url, **options), answers[-5:], strict=True):
                seen.append(score.status)
                assert answer.text.startswith("{"), "the grammar lets nothing else begin"
                if answer.finish_reason == "stop":
                    said = json.loads(answer.text)
                    assert list(said) == ["reasoning", name] and 0 <= said[name] <= 10
                    assert (score.status, score.value) == ("ok", pytest.approx(said[name] / 10))
                else:
                    assert (answer.finish_reason, score.value) == ("length", None)
                    assert score.status == "unavailable" and "finish_reason 'length'" in score.reason
    assert set(seen) == {"ok", "unavailable"} and len(answers) == 15, seen
