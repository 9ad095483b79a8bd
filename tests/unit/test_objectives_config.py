"""The objective's config, and which log-prob it may consume."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from rlmm.config.objectives import ObjectiveConfig
from rlmm.objectives import OBJECTIVES
from rlmm.objectives.legality import IllegalObjective, LogProbKind, check_legal


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_name_alone_gives_the_named_objective(name: str) -> None:
    assert ObjectiveConfig.model_validate({"name": name}).objective() == OBJECTIVES[name]


def test_published_defaults() -> None:
    dapo = ObjectiveConfig.model_validate({"name": "dapo"})
    assert (dapo.clip_low, dapo.clip_high, dapo.advantage.scale) == (0.2, 0.28, "group_std")
    rloo = ObjectiveConfig.model_validate({"name": "rloo"})
    assert (rloo.advantage.baseline, rloo.advantage.scale) == ("leave_one_out", "none")
    assert ObjectiveConfig.model_validate({}).name == "grpo"
    gspo = ObjectiveConfig.model_validate({"name": "gspo"})
    assert (gspo.level, gspo.clip_low, gspo.clip_high) == ("sequence", 3e-4, 4e-4)
    cispo = ObjectiveConfig.model_validate({"name": "cispo"})
    assert (cispo.surrogate, cispo.clip_low, cispo.clip_high) == ("cispo", 1.0, 4.0)


def test_a_given_part_replaces_only_itself() -> None:
    config = ObjectiveConfig.model_validate({"name": "dapo", "clip_low": 0.1, "advantage": {"scale": "batch_std"}})
    objective = config.objective()
    assert (objective.clip_low, objective.clip_high) == (0.1, 0.28)
    assert (objective.scale, objective.baseline, objective.weights) == ("batch_std", "mean", "dapo")
    assert ObjectiveConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "drgrpo"}, "unknown objective 'drgrpo'. Nearest: dr_grpo"),
        ({"clip_hi": 0.3}, "unknown key 'clip_hi'. Nearest: clip_high"),
        ({"advantage": {"std": 1}}, "unknown key 'std'"),
        ({"kl": {"kind": "k1", "coefficient": 0.1}}, "expected gradient of 0"),
        ({"kl": {"kind": "k2", "importance_weighted": True}}, "neither the value nor the gradient"),
        ({"kl": {"kind": "k4"}}, "'k1', 'k2' or 'k3'"),
        ({"clip_low": 0.0}, "greater than 0"),
        ({"name": "grpo", "advantage": {"baseline": "batch_mean"}}, "would divide by 0"),
        ({"updates_per_rollout": 0}, "greater than or equal to 1"),
    ],
)
def test_bad_values_say_why(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ObjectiveConfig.model_validate(given)


def test_reading_a_config_imports_no_torch() -> None:
    code = "import sys, rlmm.config.objectives, rlmm.objectives.legality; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("kind", [LogProbKind.EXACT, LogProbKind.TRAJECTORY])
def test_ratios_are_sound_on_likelihoods(name: str, kind: LogProbKind) -> None:
    assert check_legal(OBJECTIVES[name].family, kind) is None


def test_token_ratio_on_a_bound_is_refused_unless_forced() -> None:
    with pytest.raises(IllegalObjective, match="token_ratio .* elbo: a bound.*Sound kinds: exact, trajectory"):
        check_legal("token_ratio", LogProbKind.ELBO)
    assert "a bound" in (check_legal("token_ratio", LogProbKind.ELBO, force=True) or "")
    sequence = ObjectiveConfig.model_validate({"level": "sequence"}).objective()
    assert check_legal(sequence.family, LogProbKind.ELBO) is None


def test_other_rows_of_the_table() -> None:
    with pytest.raises(IllegalObjective, match="carry no trajectory"):
        check_legal("dpo", LogProbKind.TRAJECTORY)
    with pytest.raises(IllegalObjective, match="noise in the difference"):
        check_legal("token_kl", LogProbKind.ELBO)
    assert check_legal("dpo", LogProbKind.ELBO) is None
    for kind in (LogProbKind.MEAN_FIELD, LogProbKind.SURROGATE):
        assert "heuristic" in (check_legal("token_ratio", kind) or "")
        assert check_legal("ratio_free", kind) is None
        with pytest.raises(IllegalObjective, match="DPO compares likelihoods or their bounds"):
            check_legal("dpo", kind)


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown objective family 'token_ration'. Nearest: token_ratio"):
        check_legal("token_ration", LogProbKind.EXACT)
