"""A run that was killed, stopped, frozen or out of disk, started again, ends bit-identical to one left alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlmm.train.processes import EXIT_HUNG
from rlmm.train.signals import EXIT_STOPPED
from tests.integration.kill_driver import differences

ROOT = Path(__file__).parents[2]


PLACES = ["rollout", "scoring", "update", "save"]
STOPS = ["stop"]
SLOW_PLACES = ["result", "between"]
SLOW_STOPS = ["stop in evaluation", "full"]
MASKED_PLACES = ["rollout", "update"]
NOISE_PLACES_OF_TWO = ["rollout", "update of two"]
MASKED_PLACES_OF_TWO = ["rollout", "scoring", "update of two", "save of two"]
EVENTS_OF_TWO = ["stop of two", "hang of two", "full of two"]
DPO_PLACES = ["codec", "sft", "stop in pairs", "pairs", "pair files", "reference", "dpo", "evaluation", "export"]
MASKED_DPO_PLACES = ["pairs", "dpo"]
AHEAD_PLACES = ["rollout", "scoring", "update", "save"]
MASKED_AHEAD_PLACES_OF_TWO = ["rollout", "update of two", "stop of two"]


def killed_runs(out: Path, recipe: str, places: list[str], processes: int = 1) -> dict:
    driver, path = ROOT / "tests" / "integration" / "kill_driver.py", ROOT / "tests" / "recipes" / recipe
    answer = subprocess.run(
        [sys.executable, str(driver), str(out), str(path), str(processes), *places],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert answer.returncode == 0, answer.stderr[-6000:]
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return killed_runs(tmp_path_factory.mktemp("kills"), "tiny.yaml", [*PLACES, *STOPS])


@pytest.fixture(scope="module")
def slow_report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return killed_runs(tmp_path_factory.mktemp("slow"), "tiny.yaml", [*SLOW_PLACES, *SLOW_STOPS])


@pytest.fixture(scope="module")
def masked_report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return killed_runs(tmp_path_factory.mktemp("masked_kills"), "tiny_masked.yaml", MASKED_PLACES)


@pytest.fixture(scope="module")
def report_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of two processes, to the second of which it happens."""
    places = MASKED_PLACES_OF_TWO + EVENTS_OF_TWO
    return killed_runs(tmp_path_factory.mktemp("two_killed"), "tiny_masked.yaml", places, 2)


@pytest.fixture(scope="module")
def noise_report_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of two processes whose log-probs are made with noise plans, old and reference ones among them."""
    out = tmp_path_factory.mktemp("noise_of_two")
    made = yaml.safe_load((ROOT / "tests" / "recipes" / "tiny_masked.yaml").read_text())
    kl = {"kind": "k2", "coefficient": 0.1}
    made["stages"]["grpo"]["objective"] = {"name": "gspo", "clip_low": 0.2, "updates_per_rollout": 2, "kl": kl}
    made["stages"]["grpo"]["estimator"] = {"kind": "count", "draws": 2}
    path = out / "noise.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    return killed_runs(out, str(path), NOISE_PLACES_OF_TWO, 2)


@pytest.fixture(scope="module")
def dpo_report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return killed_runs(tmp_path_factory.mktemp("dpo_kills"), "tiny_dpo.yaml", DPO_PLACES)


@pytest.fixture(scope="module")
def masked_dpo_report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return killed_runs(tmp_path_factory.mktemp("masked_dpo_kills"), "tiny_masked_dpo.yaml", MASKED_DPO_PLACES)


def killed_ahead(out: Path, recipe: str, places: list[str], processes: int = 1) -> dict:
    """Of the recipe with rollouts that are drawn a step ahead."""
    made = yaml.safe_load((ROOT / "tests" / "recipes" / recipe).read_text())
    made["stages"]["grpo"]["max_staleness"] = 1
    made["stages"]["grpo"]["objective"]["mismatch"] = {"kind": "truncate"}
    path = out / recipe
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    return killed_runs(out, str(path), places, processes)


@pytest.fixture(scope="module")
def ahead_report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return killed_ahead(tmp_path_factory.mktemp("ahead_kills"), "tiny.yaml", [*AHEAD_PLACES, *STOPS])


@pytest.fixture(scope="module")
def ahead_report_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return killed_ahead(tmp_path_factory.mktemp("ahead_of_two"), "tiny_masked.yaml", MASKED_AHEAD_PLACES_OF_TWO, 2)


def test_a_file_that_only_one_run_has_is_a_difference() -> None:
    assert differences({"a": "1", "b": "2", "c": "3"}, {"b": "2", "c": "4", "d": "5"}) == ["a", "c", "d"]


def test_the_digest_covers_weights_metrics_and_evaluation(report: dict) -> None:
    names = " ".join(report["files"])
    for part in ("codec.safetensors", "02-sft/model", "03-grpo/model", "03-grpo/metrics.jsonl", "eval"):
        assert part in names


@pytest.mark.parametrize("place", PLACES)
def test_resume_is_bit_identical(report: dict, place: str) -> None:
    check(report["places"][place])


@pytest.mark.long
@pytest.mark.parametrize("place", SLOW_PLACES)
def test_so_it_is_where_little_is_left_to_do(slow_report: dict, place: str) -> None:
    check(slow_report["places"][place])


@pytest.mark.long
@pytest.mark.parametrize("place", MASKED_PLACES)
def test_resume_of_a_masked_policy_is_bit_identical(masked_report: dict, place: str) -> None:
    check(masked_report["places"][place])


@pytest.mark.long
@pytest.mark.parametrize("place", MASKED_PLACES_OF_TWO)
def test_resume_of_a_masked_policy_on_two_processes_is_bit_identical(report_of_two: dict, place: str) -> None:
    check(report_of_two["places"][place])
    log = report_of_two["places"][place]["log"]
    assert "resuming from step 3 of 6" in log
    assert ("passing over checkpoint-6: it has no manifest" in log) == (place == "save of two")


@pytest.mark.long
@pytest.mark.parametrize("place", NOISE_PLACES_OF_TWO)
def test_so_it_is_of_log_probs_by_noise_plans(noise_report_of_two: dict, place: str) -> None:
    check(noise_report_of_two["places"][place])
    assert "resuming from step" in noise_report_of_two["places"][place]["log"]


@pytest.mark.long
@pytest.mark.parametrize("place", [*AHEAD_PLACES, *STOPS])
def test_resume_of_rollouts_drawn_ahead_is_bit_identical(ahead_report: dict, place: str) -> None:
    check(ahead_report["places"][place], EXIT_STOPPED if place in STOPS else -signal.SIGKILL)
    # The third rollout is drawn before the first checkpoint, which is inside the second.
    assert ("resuming from step" in ahead_report["places"][place]["log"]) == (place != "rollout")


@pytest.mark.long
@pytest.mark.parametrize("place", MASKED_AHEAD_PLACES_OF_TWO)
def test_so_it_is_on_two_processes_and_of_a_masked_policy(ahead_report_of_two: dict, place: str) -> None:
    check(ahead_report_of_two["places"][place], EXIT_STOPPED if place.startswith("stop") else -signal.SIGKILL)
    assert ("resuming from step" in ahead_report_of_two["places"][place]["log"]) == (place != "rollout")


@pytest.mark.long
@pytest.mark.parametrize("place", DPO_PLACES)
def test_resume_of_preferences_is_bit_identical(dpo_report: dict, place: str) -> None:
    names = " ".join(dpo_report["files"])
    for part in (
        "01-codec/metrics.jsonl",
        "02-sft/metrics.jsonl",
        "03-pairs/pairs.parquet",
        "03-pairs/margins.json",
        "04-dpo/preferences.json",
        "04-dpo/model",
        "05-pairs2/metrics.jsonl",
        "06-dpo2/metrics.jsonl",
        "merged",
    ):
        assert part in names
    check(dpo_report["places"][place], EXIT_STOPPED if place == "stop in pairs" else -signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("place", MASKED_DPO_PLACES)
def test_resume_of_preferences_of_a_masked_policy_is_bit_identical(masked_dpo_report: dict, place: str) -> None:
    names = " ".join(masked_dpo_report["files"])
    for part in ("03-pairs/pairs.parquet", "04-dpo/metrics.jsonl", "05-kto/model"):
        assert part in names
    check(masked_dpo_report["places"][place])


def test_a_run_that_is_asked_to_stop_keeps_its_step_and_resumes_bit_identical(report: dict) -> None:
    check(report["places"]["stop"], EXIT_STOPPED)
    log = report["places"]["stop"]["log"]
    # The step in which it was asked is the last one made, and checkpoints are of every third.
    assert "stopped by SIGTERM" in log and "resuming from step 5 of 6" in log


@pytest.mark.long
def test_an_evaluation_is_left_at_once_and_begun_again(slow_report: dict) -> None:
    found = slow_report["places"]["stop in evaluation"]
    check(found, EXIT_STOPPED)
    assert found["log"].count("evaluating sft at temperature 1 ") == 2
    assert found["log"].count("evaluating grpo at temperature 1 ") == 1


@pytest.mark.long
def test_a_full_disk_is_named_and_nothing_is_lost(slow_report: dict) -> None:
    found = slow_report["places"]["full"]
    check(found, 2)
    assert "error: a file of the stage: " in found["log"] and "mend the disk" in found["log"]
    assert "resuming from step 3 of 6" in found["log"]


@pytest.mark.long
def test_a_full_disk_is_named_and_ends_both_processes(report_of_two: dict) -> None:
    found = report_of_two["places"]["full of two"]
    assert found["statuses"][0] == 2 and found["statuses"][1] != 0
    assert found["resumed"] == 0 and found["differing"] == []
    assert "error: a file of the stage: " in found["log"] and "mend the disk" in found["log"]
    assert "resuming from step 3 of 6" in found["log"]


@pytest.mark.long
def test_processes_stop_together_where_one_is_asked(report_of_two: dict) -> None:
    found = report_of_two["places"]["stop of two"]
    check(found, EXIT_STOPPED)
    assert found["statuses"] == [EXIT_STOPPED] * 2 and "resuming from step 4 of 6" in found["log"]


@pytest.mark.long
def test_a_process_that_stands_still_is_named_and_ends_the_run(report_of_two: dict) -> None:
    found = report_of_two["places"]["hang of two"]
    check(found, -signal.SIGKILL)  # what is stopped does not end by itself: launchers kill it when the other has gone
    assert found["statuses"][0] == EXIT_HUNG
    (line,) = [line for line in found["log"].splitlines() if line.startswith("rlmm: ")]
    assert line.startswith("rlmm: process 1 ") and "of step 4" in line and "has been silent" in line
    assert "process 0" not in line


def check(found: dict, code: int = -signal.SIGKILL) -> None:
    assert found["killed"] == code, found["log"]
    assert found["resumed"] == 0, found["log"]
    assert found["differing"] == [], found["log"]
    assert "no scores" not in found["log"], "each process goes on with what its judges have said"


def test_a_torn_checkpoint_is_named_and_the_one_before_used(report: dict) -> None:
    log = report["places"]["save"]["log"]
    assert "passing over checkpoint-6: it has no manifest" in log
    assert "resuming from step 3 of 6" in log
