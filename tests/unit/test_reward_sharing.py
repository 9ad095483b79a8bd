"""Which process of a run starts a served reward, and how the others learn where it listens."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from rlmm import reward_process
from rlmm.config.rewards import Rewards, RewardTerm
from rlmm.reward_process import Address, served_reward, share_served
from rlmm.train.processes import OtherProcessError

TERM = RewardTerm.model_validate({"name": "jpeg_size", "serve": {}})
REWARDS = [Rewards(terms=(TERM,)), Rewards(terms=(TERM.model_copy(update={"label": "again"}),))]
DONE = [(None, None), (None, None)]
STARTED = Address("http://127.0.0.1:1", "another process's")


class Started:
    """What is started in place of a process."""

    made: list["Started"] = []
    fault = ""

    def __init__(self, term: RewardTerm) -> None:
        self.alive, self.made = True, [*self.made, self]
        Started.made = self.made
        self.address = Address(f"http://127.0.0.1:{len(self.made)}", "this process's")

    def wait(self) -> None:
        if self.fault:
            raise ValueError(self.fault)

    def stop(self) -> None:
        self.alive = False


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Started, "made", [])
    monkeypatch.setattr(reward_process, "RewardProcess", Started)
    monkeypatch.setattr(reward_process, "_RUNNING", {})
    monkeypatch.setattr(reward_process, "_SHARED", {})
    monkeypatch.setattr(reward_process, "connect", lambda url, token, **settings: Address(url, token))
    monkeypatch.setattr(reward_process, "_machine", lambda: "here")
    yield


def become(patch: pytest.MonkeyPatch, rank: int, *answers: Sequence[Any]) -> None:
    """This process is `rank` of those that answer; in each collective the others answer what stands in their place."""
    left, size = list(answers), max([2, *(len(one) for one in answers)])

    def gather(value: Any) -> list[Any]:
        told = list(left.pop(0))
        told[rank] = value
        return told

    for module in (reward_process, "rlmm.train.processes"):
        name = module if isinstance(module, str) else module.__name__
        patch.setattr(f"{name}.world", lambda: (rank, size))
        patch.setattr(f"{name}.gather", gather)


def test_the_first_process_of_a_machine_starts_one_for_all_who_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, 0, ["here", "here"], DONE, [{}, {}])
    share_served(REWARDS)
    (made,) = Started.made
    assert served_reward(TERM) == served_reward(TERM.model_copy(update={"weight": 2.0})) == made.address
    made.alive = False
    become(monkeypatch, 0, ["here", "here"], DONE, [{}, {}])
    share_served(REWARDS)
    assert served_reward(TERM) == Started.made[1].address != made.address, "a stage finds a dead one and starts another"
    reward_process.stop_served()
    assert not Started.made[1].alive


def test_the_others_of_the_machine_are_told_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    key = reward_process._key(TERM)
    become(monkeypatch, 1, ["here", "here"], DONE, [{key: STARTED}, {}])
    with pytest.raises(AssertionError, match="jpeg_size was not started for all"):
        served_reward(TERM)
    share_served(REWARDS)
    assert served_reward(TERM) == STARTED and not Started.made
    reward_process.stop_served()
    assert not reward_process._SHARED


def test_who_is_told_of_several_takes_that_of_its_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    key, other = reward_process._key(TERM), Address("http://127.0.0.1:2", "another machine's")
    become(monkeypatch, 2, ["here", "elsewhere", "here"], [*DONE, DONE[0]], [{key: STARTED}, {key: other}, {}])
    share_served(REWARDS)
    assert served_reward(TERM) == STARTED and not Started.made


def test_another_machine_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, 1, ["elsewhere", "here"], DONE, [{reward_process._key(TERM): STARTED}, {}])
    share_served(REWARDS)
    (made,) = Started.made
    assert served_reward(TERM) == made.address


def test_one_that_does_not_come_up_ends_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Started, "fault", "it ended")
    become(monkeypatch, 0, ["here", "here"], DONE)
    with pytest.raises(ValueError, match="it ended"):
        share_served(REWARDS)
    assert not reward_process._RUNNING and not Started.made[0].alive
    become(monkeypatch, 1, ["here", "here"], [("ValueError: it ended", "it ended"), None])
    with pytest.raises(OtherProcessError, match="process 0 failed: ValueError: it ended"):
        share_served(REWARDS)


def test_what_the_first_process_does_alone_needs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, 0)
    assert served_reward(TERM) == Started.made[0].address
    share_served([Rewards(terms=(TERM.model_copy(update={"serve": None}),))])  # nothing to share, no collective


def test_a_launchers_variables_are_about_the_process_that_it_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU"):
        assert reward_process.LAUNCHED.fullmatch(name)
    for name in ("CUDA_VISIBLE_DEVICES", "HF_HOME", "MY_RANK", "PATH"):
        assert not reward_process.LAUNCHED.fullmatch(name)
