"""What a stage asks that its engine, its checkpoint or the number of processes cannot give: said before the first
stage, where the checkpoint is at hand, and not hours later."""

from collections.abc import Iterator
from importlib.util import find_spec

from rlmm.config.engines import EngineConfig, VllmEngineConfig, VllmServerConfig, VllmSizes
from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe
from rlmm.config.sampling import Sampled, Written
from rlmm.config.stages import GrpoStage, PairsStage, SftStage, Stage
from rlmm.planned_data import has_sources
from rlmm.policies.families.loading import load_spelling, not_here
from rlmm.policies.responses import stop_tokens
from rlmm.train.engines import check_gpus
from rlmm.train.trackers import check_trackers
from rollouts.contract import Layout, Seeing
from rollouts.unmasking import check_steps
from rollouts.vllm_engine.faults import NOT_INSTALLED


def check_stages(recipe: Recipe, processes: int = 1) -> None:
    """Raises ValueError naming the stage, and what to do."""
    check_trackers(recipe.runtime.trackers)
    for name, stage in recipe.stages.items():
        if isinstance(stage, GrpoStage) or (isinstance(stage, PairsStage) and stage.rollouts is None):
            _check_engine(name, stage.engine, processes)
    if not isinstance(recipe.policy, CheckpointPolicy) or not_here(recipe.policy) is not None:
        return
    spelling = load_spelling(recipe.policy.path, recipe.policy)
    for name, stage in recipe.stages.items():
        _check_steps(name, stage, spelling.layout)
        _check_length(name, stage, spelling.positions)
        if isinstance(stage, SftStage):
            check_text(stage, spelling.layout)
    for place, written, sources, engine in _texts(recipe):
        try:
            stop_tokens(spelling, written)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if sources and spelling.layout.seeing is not None:
            _check_seeing(place, spelling.layout.seeing, engine)


def _check_engine(name: str, engine: EngineConfig, processes: int) -> None:
    here = isinstance(engine, VllmEngineConfig) or (isinstance(engine, VllmServerConfig) and not engine.urls)
    if here and find_spec("vllm") is None:
        raise ValueError(f"stage {name!r}: {NOT_INSTALLED}")
    if isinstance(engine, VllmEngineConfig) and processes > 1:
        raise ValueError(
            f"stage {name!r}: engine.kind vllm runs inside a single process and this run has {processes}; set "
            "vllm_server or torch, or start one process"
        )
    if isinstance(engine, VllmServerConfig):
        check_gpus(engine)
    if isinstance(engine, VllmServerConfig) and 0 < len(engine.urls) < processes:
        raise ValueError(
            f"stage {name!r}: {processes} training processes and {len(engine.urls)} rollout server(s); start one for "
            "each process and list them in engine.urls"
        )


def check_text(config: SftStage, layout: Layout) -> None:
    """Raises ValueError where a stage would teach text that no head decides."""
    if config.text_weight and not layout.decides_text:
        raise ValueError(
            f"text_weight {config.text_weight}: checkpoints of family {layout.family!r} learn no text (they have no "
            "head for it, or it has no masked form), so a prompt cannot be learned; set it to 0"
        )


def _check_steps(name: str, stage: Stage, layout: Layout) -> None:
    """Of a masked checkpoint: each step reveals a position. Of a new policy the recipe itself tells the grid."""
    sampled = stage.sampling if isinstance(stage, GrpoStage | PairsStage) else stage
    if not isinstance(sampled, Sampled) or sampled.unmasking is None:
        return
    try:
        check_steps(sampled.unmasking.record(), len(layout.grid.decided()))
    except ValueError as error:
        raise ValueError(f"stage {name!r}: {error}") from error


def _check_length(name: str, stage: Stage, positions: int) -> None:
    """Of the checkpoint that stages start from; each after it has as many."""
    engine = stage.engine if isinstance(stage, GrpoStage | PairsStage) else None
    if not isinstance(engine, VllmSizes):
        return
    try:
        engine.positions(positions)
    except ValueError as error:
        raise ValueError(f"stage {name!r}: {error}") from error


def _texts(recipe: Recipe) -> Iterator[tuple[str, Written, bool, EngineConfig | None]]:
    """Where text is sampled: the place, how, whether about pictures, and by which engine."""
    about = has_sources(recipe.data)
    if (asked := recipe.understanding) is not None:
        yield "understanding.answer", asked.answer, has_sources(asked.data), None
    for name, stage in recipe.stages.items():
        if isinstance(stage, GrpoStage | PairsStage) and stage.sampling.written is not None:
            kind = "answer" if stage.sampling.answer is not None else "thought"
            yield f"{name}.sampling.{kind}", stage.sampling.written, about, stage.engine
        if isinstance(stage, PairsStage) and stage.understanding is not None:
            yield f"{name}.understanding.answer", stage.understanding.answer, True, stage.engine
        if isinstance(stage, PairsStage) and stage.judge is not None:
            yield f"{name}.judge.answer", stage.judge.answer, True, stage.engine


def _check_seeing(place: str, seeing: Seeing, engine: EngineConfig | None) -> None:
    if isinstance(engine, VllmServerConfig):
        raise ValueError(
            f"{place}: the policy sees source images through an encoder of its own, and vLLM servers have its language "
            "model alone; set engine.kind: vllm or torch"
        )
    if seeing.mean is None or seeing.std is None:
        raise ValueError(
            f"{place}: the checkpoint has no preprocessor_config.json, which says how the pixels of an image to be "
            "answered about are normed: put the release's beside the model"
        )
