"""The best of n samples: which one, and what its score is to be expected to be."""

from itertools import combinations
from math import nan

import numpy as np
import pytest
from PIL import Image

from rlmm.best_of import rank, rewards_named
from rlmm.config.recipe import RecipeError
from rlmm.evaluation.best_of import best, curve, expected_best
from rlmm.sampling import Samples

DARKNESS = "tests/recipes/rewards.py:darkness"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_expectation_is_the_mean_over_all_subsets(n: int) -> None:
    scores = [0.3, -1.0, 2.5, 0.3, 0.9, 0.0]  # two are equal
    wanted = np.mean([max(part) for part in combinations(scores, n)])
    assert expected_best(scores, n) == pytest.approx(wanted, rel=1e-12)


def test_samples_without_a_score_are_left_out() -> None:
    assert expected_best([nan, 1.0, nan, 3.0], 2) == 3.0
    assert np.isnan(expected_best([nan, 1.0], 2))


def test_the_curve_goes_to_all_of_them_and_begins_at_the_mean() -> None:
    scores = np.array([[0.0, 1.0, 0.0, 1.0, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]])
    points = curve(scores)
    assert [point.n for point in points] == [1, 2, 4, 5]
    assert points[0].mean == pytest.approx(scores.mean()) and points[-1].mean == pytest.approx(0.6)
    assert all(a.mean <= b.mean for a, b in zip(points, points[1:], strict=False))


def test_the_best_is_the_first_of_the_highest() -> None:
    assert best([0.1, nan, 0.7, 0.7]) == 2
    assert best([nan, nan]) == 0


def samples() -> Samples:
    """Greys: of the first prompt 200, 10, 90, of the second 30, 250, 60."""
    return Samples([Image.new("L", (4, 4), grey) for grey in (200, 10, 90, 30, 250, 60)], [""] * 6, 3)


def test_the_darkest_are_kept_the_darkest_first() -> None:
    ranked = rank(samples(), ["a", "b"], rewards_named(DARKNESS), 2)
    assert [image.getpixel((0, 0)) for image in ranked.samples.images] == [10, 90, 30, 60]
    assert ranked.scores[0].tolist() == pytest.approx([1 - 10 / 255, 1 - 90 / 255])
    assert ranked.curve[-1].n == 3 and ranked.curve[-1].mean == pytest.approx(1 - 20 / 255)
    assert ranked.lines(["a", "b"])[0] == "a: 0.961, 0.647" and "best of 3: 0.922" in ranked.lines(["a", "b"])[-1]


def test_more_than_were_drawn_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="the 4 best of 3"):
        rank(samples(), ["a", "b"], rewards_named(DARKNESS), 4)


def test_rewards_are_a_recipes_or_one_by_its_name() -> None:
    assert rewards_named("scenes").terms[0].name == "scenes"
    assert rewards_named("quickstart").terms[0].parts == {"exact": 1.0, "value": 0.5}
    with pytest.raises(RecipeError, match="no recipe at"):
        rewards_named("scene.yaml")
    with pytest.raises(ValueError, match="no reward and no recipe 'scene'. Nearest: scenes"):
        rewards_named("scene")


def test_where_no_sample_has_a_score_none_is_the_best() -> None:
    """The scenes verifier reads what a scene must have in a column."""
    with pytest.raises(ValueError, match="none of the 6 samples has a score, .* no 'scene' column .* --row"):
        rank(samples(), ["a", "b"], rewards_named("scenes"), 2)
