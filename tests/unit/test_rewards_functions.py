"""A user's function as a reward: how it is found, its two signatures, and what goes wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from rewards import REWARDS, build
from rewards.base import Sample, Score, SeesGroups
from rewards.functions import FunctionReward, RewardLoadError
from rewards.runner import RewardContractError, RewardRunner

RED, BLUE = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
SAMPLES = [
    Sample("a", "g", "first", (RED,), row={"answer": 1, "tag": "x"}, source_images=(BLUE,)),
    Sample("b", "g", "second", (BLUE, RED), row={"answer": 2}),
    Sample("c", "g", "third", text="no image", row={}),
]
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes source to a file and gives the target of its function `f`."""

    def to(source: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text("from rewards.base import Score\n" + source)
        return f"{path}:f"

    return to


def run(target: str, **options: object) -> list[Score]:
    return RewardRunner(FunctionReward(target, options=options), retries=0).score(SAMPLES)


def test_our_signature(write: Write) -> None:
    target = write("def f(samples):\n    return [Score.ok(1.0, part=0.5), None, len(samples)]\n")
    scores = run(target)
    assert scores[0].parts == {"part": 0.5}
    assert scores[1].reason == "not applicable"
    assert scores[2].value == 3.0


def test_trl_signature_gets_images_and_the_columns_it_names(write: Write) -> None:
    target = write(
        "def f(prompts, completions, answer, source_images):\n"
        "    assert prompts == ['first', 'second', 'third']\n"
        "    assert completions[0].getpixel((0, 0)) == (255, 0, 0)\n"
        "    assert [im.getpixel((0, 0)) for im in completions[1]] == [(0, 0, 255), (255, 0, 0)]\n"
        "    assert completions[2] == 'no image'\n"
        "    assert [len(images) for images in source_images] == [1, 0, 0]\n"
        "    return answer\n"
    )
    scores = run(target)
    assert [(score.value, score.reason) for score in scores] == [(1, ""), (2, ""), (None, "not applicable")]


def test_trl_signature_with_kwargs_gets_every_column(write: Write) -> None:
    target = write(
        "def f(completions, **kwargs):\n"
        "    others = ['prompts', 'source_images', 'target_images', 'target_texts', 'texts']\n"
        "    assert sorted(kwargs) == sorted(['answer', 'tag', *others])\n"
        "    return [0.0 if tag is None else 1.0 for tag in kwargs['tag']]\n"
    )
    assert [score.value for score in run(target)] == [1, 0, 0]


@pytest.mark.parametrize("head", ["async def f(samples)", "async def f(completions, **kwargs)"])
def test_async_functions_share_one_loop_between_calls(write: Write, head: str) -> None:
    target = write(
        f"import asyncio\nloops = set()\n{head}:\n    await asyncio.sleep(0)\n"
        "    loops.add(id(asyncio.get_running_loop()))\n    return [float(len(loops))] * 3\n"
    )
    runner = RewardRunner(FunctionReward(target), deadline_s=10)
    for _ in range(2):
        assert [score.value for score in runner.score(SAMPLES)] == [1, 1, 1]


def test_options_are_keywords(write: Write) -> None:
    target = write("def f(samples, scale, shift=1):\n    return [scale + shift] * len(samples)\n")
    assert run(target, scale=2)[0].value == 3
    with pytest.raises(RewardLoadError, match="'scal'. Nearest: scale"):
        FunctionReward(target, options={"scal": 2})


def test_a_column_that_the_data_lacks_stops_the_run_and_names_the_nearest(write: Write) -> None:
    target = write("def f(prompts, completions, anwser):\n    return anwser\n")
    with pytest.raises(RewardContractError, match="'anwser'.*Nearest: answer"):
        run(target)


def test_a_column_with_a_default_may_be_missing(write: Write) -> None:
    target = write("def f(completions, other=None):\n    return [1.0 if other is None else 0.0] * 3\n")
    assert run(target)[0].value == 1


@pytest.mark.parametrize("head", ["def f()", "def f(a, b)"])
def test_other_signatures_are_refused(write: Write, head: str) -> None:
    target = write(f"{head}:\n    return []\n")
    with pytest.raises(RewardLoadError, match="a reward function is"):
        FunctionReward(target)


def test_a_function_that_raises_makes_its_samples_unavailable(write: Write) -> None:
    scores = run(write("def f(samples):\n    raise RuntimeError('out of quota')\n"))
    assert {score.status for score in scores} == {"unavailable"}
    assert "RuntimeError" in scores[0].reason and "out of quota" in scores[0].reason


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{folder}/mine.py:g", "no function 'g'"),
        ("{folder}/mine.py:function_to_cal", "Nearest: function_to_call"),
        ("{folder}/mine.py:NUMBER", "int, not a function"),
        ("{folder}/mien.py:f", "no file .*mien.py.*Nearest: mine.py"),
        ("{folder}/mine.py", "must be written"),
        ("no_such_package.rewards:f", "no module 'no_such_package.rewards'"),
        ("rewards.no_such_module:f", "no module 'rewards.no_such_module'"),
        ("json:dumsp", "Nearest: dump, dumps"),
    ],
)
def test_targets_that_are_not_there(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "mine.py").write_text("NUMBER = 3\ndef function_to_call(samples):\n    return []\n")
    with pytest.raises(RewardLoadError, match=message):
        FunctionReward(target.format(folder=tmp_path))


def test_a_module_that_lacks_an_import_of_its_own_says_which(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        FunctionReward(f"{tmp_path}/mine.py:f")


def test_an_edit_of_the_file_changes_the_fingerprint(write: Write) -> None:
    first = FunctionReward(write("def f(samples):\n    return [1.0]\n")).fingerprint()
    second = FunctionReward(write("def f(samples):\n    return [2.0]\n")).fingerprint()
    assert first != second
    optioned = FunctionReward(write("def f(samples, k=1):\n    return [2.0]\n"), options={"k": 3})
    assert "'k': 3" in optioned.fingerprint()


def test_two_files_of_one_name_do_not_hide_each_other(tmp_path: Path) -> None:
    values = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"def f(samples):\n    return ['{folder}']\n")
        values.append(FunctionReward(f"{tmp_path / folder}/mine.py:f").function([]))
    assert values == [["one"], ["two"]]


def test_the_registry_builds_by_name_and_names_the_nearest(write: Write) -> None:
    reward = build("function", target=write("def f(samples, k):\n    return [k] * len(samples)\n"), k=2.0)
    assert RewardRunner(reward).score(SAMPLES)[0].value == 2.0
    assert {"ocr", "scenes", "yes_no", "clip_score", "objects", "remote", "function", "cider"} <= set(REWARDS)
    assert all((make.__doc__ or "").strip() for make in REWARDS.values())
    with pytest.raises(ValueError, match="no reward 'scens'. Nearest: scenes"):
        build("scens")
    with pytest.raises(ValueError, match="no option 'hight'. Nearest: height"):
        build("ocr", hight=32)
    with pytest.raises(ValueError, match="needs the option 'target'"):
        build("function")


CLASSES = """
class Ranks:
    name = "ranks"
    whole_groups = True
    def __init__(self, scale=1.0):
        self.scale = scale
    def fingerprint(self):
        return f"ranks {self.scale}"
    def score(self, samples):
        return [self.scale * len(samples)] * len(samples)

class Half:
    name = "half"
"""


def test_a_class_of_ones_own_may_see_groups(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(CLASSES)
    reward = build("function", target=f"{tmp_path / 'own.py'}:Ranks", scale=0.5)
    assert isinstance(reward, SeesGroups) and reward.fingerprint() == "ranks 0.5"
    samples = [Sample(str(at), group, "p") for at, group in enumerate("abaa")]
    assert [score.value for score in RewardRunner(reward, batch_size=1).score(samples)] == [1.5, 0.5, 1.5, 1.5]
    with pytest.raises(RewardLoadError, match="takes no option 'scael'. Nearest: scale"):
        build("function", target=f"{tmp_path / 'own.py'}:Ranks", scael=1)
    with pytest.raises(RewardLoadError, match="no score and no fingerprint"):
        build("function", target=f"{tmp_path / 'own.py'}:Half")


def test_what_a_function_is_given_is_no_option_of_it(write: Write) -> None:
    for source, hint in (
        ("def f(samples, scale=1):\n    return [1.0]\n", "'scael'. Nearest: scale"),
        ("def f(samples):\n    return [1.0]\n", "'scael'. It takes none."),
    ):
        with pytest.raises(RewardLoadError, match=hint):
            build("function", target=write(source), scael=2)
