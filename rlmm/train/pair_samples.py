"""Samples drawn anew for pairs: of each prompt's picture, of answers about a row's own picture, scored and stored."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rewards.base import Sample
from rewards.compose import CompositeReward, Scored
from rlmm.codecs import Codec
from rlmm.config.pairs import Asked, PairsStage
from rlmm.config.sampling import Sampling
from rlmm.data import Example
from rlmm.policies.responses import Response, response_of, texts_of
from rlmm.policies.transformer import TransformerPolicy
from rlmm.rewarding import build_composite
from rlmm.seeds import derive, epoch_indices
from rlmm.train import experience as phases
from rlmm.train.context import StageContext, image_tokens, load_split
from rlmm.train.drawing import decode_images
from rlmm.train.engines import build_engine, within
from rlmm.train.experience import Timed
from rlmm.train.faults import storing
from rlmm.train.processes import world
from rlmm.train.signals import asked, leaving, stop_if_asked
from rlmm.train.sync import synced
from rlmm.train.tokens import ImageTokens
from rollouts.contract import Engine
from rollouts.store import write_trajectory

PICTURES, ANSWERS = "rollouts", "answers"
"""Folders of the two kinds of samples."""


Scorer = Callable[[Engine, Sequence[Sample]], list[Scored]]
"""What scores samples, unless too many failed. The engine is the one that drew them: a policy that judges itself has it
answer, too."""


def scored_by(composite: CompositeReward) -> Scorer:
    """By rewards, which need no engine."""
    return lambda _, samples: composite.checked(samples)


@dataclass(frozen=True)
class OwnJudge:
    """The policy says what a picture of its own shows; what compares that with the prompt is the score."""

    policy: TransformerPolicy
    tokens: ImageTokens
    asked: Asked
    seed: int

    def __call__(self, engine: Engine, samples: Sequence[Sample]) -> list[Scored]:
        response = answering(self.policy, self.asked)
        examples = [about(self.asked, Example(one.prompt, one.images[0], row=one.row)) for one in samples]
        seeds = [derive(self.seed, "judge", one.sample_id) for one in samples]
        requests = [
            phases.request_for(response, self.tokens, example, one.sample_id, [seed])
            for example, one, seed in zip(examples, samples, seeds, strict=True)
        ]
        made = phases.generate(engine, response, requests, self.policy.model)
        answers = phases.samples_of(made, examples, [], texts_of(self.policy.tokenizer, made))
        return build_composite(self.asked.rewards).checked(answers)


def answering(policy: TransformerPolicy, asked: Asked) -> Response:
    """How answers are drawn. Raises UnusablePrompt where the policy cannot take the question with a picture."""
    response = response_of(policy, Sampling(answer=asked.answer))
    if (fault := response.spelling.fault(asked.question, 1)) is not None:
        raise fault
    return response


def about(asked: Asked, example: Example) -> Example:
    """The question about a row's picture; the row's prompt is the right answer."""
    assert example.target is not None, "the split has pictures"
    return Example(asked.question, sources=(example.target,), texts=(example.prompt,), row=example.row)


@dataclass(frozen=True)
class Drawing:
    """What is sampled and what scores it; `example` gives the row of a place among the stage's prompts."""

    response: Response
    example: Callable[[int], Example]
    scorer: Scorer
    folder: Path
    seed: int


def drawings(
    context: StageContext, policy: TransformerPolicy, codec: Codec, scorer: Scorer, folder: Path
) -> dict[str, Drawing]:
    """The stage's samples of pictures, and those of answers where it asks for them: of the same rows."""
    config: PairsStage = context.config
    response, seed = response_of(policy, config.sampling), context.seed("rollouts")
    data = load_split(context, config.split, within(config.engine, response.spelling))
    rows = epoch_indices(len(data), 0, config.prompts, seed, "prompts")
    if (asked := config.understanding) is not None:
        # A row without a picture cannot be asked about.
        missing = next((row for row in rows if data[row].target is None), None)
        if missing is not None:
            raise ValueError(f"understanding asks about pictures, and row {missing} of split {config.split} has none")
    found = {PICTURES: Drawing(response, lambda place: data[rows[place]], scorer, folder / PICTURES, seed)}
    if asked is not None:
        found[ANSWERS] = Drawing(
            answering(policy, asked),
            lambda place: about(asked, data[rows[place]]),
            scored_by(build_composite(asked.rewards)),
            folder / ANSWERS,
            context.seed("answers"),
        )
    return found


def draw(context: StageContext, policy: TransformerPolicy, codec: Codec, what: Drawing) -> list[Path]:
    """Sample and score every place, a file a batch; what is there already is passed over. Processes take turns, and a
    batch is the same whichever makes it. Returns every batch's file. Raises Stopped after a batch where the run was
    asked to stop."""
    config: PairsStage = context.config
    starts = range(0, config.prompts, config.batch_prompts)
    paths = [what.folder / f"step-{number:06d}.parquet" for number in range(len(starts))]
    rank, processes = world()
    missing = [number for number in range(rank, len(starts), processes) if not paths[number].is_file()]
    if missing:
        with closing(build_engine(config.engine, policy, what.response.law)) as engine:
            synced(policy, engine, 0)  # a server that runs already may hold any weights
            tokens = image_tokens(context, codec, policy)
            for number in missing:
                if asked():
                    break
                places = range(starts[number], min(starts[number] + config.batch_prompts, config.prompts))
                with leaving(at_once=False):
                    _draw_batch(context, policy, tokens, what, engine, places, number, paths[number])
                kind = what.folder.name
                context.say(f"{context.name}: {kind} of {places.stop} of {config.prompts} prompts drawn and scored")
    stop_if_asked()
    return paths


def _draw_batch(
    context: StageContext,
    policy: TransformerPolicy,
    tokens: ImageTokens,
    what: Drawing,
    engine: Engine,
    places: range,
    number: int,
    path: Path,
) -> None:
    count, timed = context.config.samples_per_prompt, Timed()
    examples = [what.example(place) for place in places]
    with timed("rollout"):
        requests = [
            phases.request_for(
                what.response,
                tokens,
                example,
                f"{context.name}/{place:06d}",
                [derive(what.seed, "sample", place, sample) for sample in range(count)],
            )
            for place, example in zip(places, examples, strict=True)
        ]
        made = phases.generate(engine, what.response, requests, policy.model)
    each = [example for example in examples for _ in range(count)]
    with timed("score"):
        images = decode_images(tokens.codec, policy, made)
        samples = phases.samples_of(made, each, images, texts_of(policy.tokenizer, made))
        columns = phases.scored_columns(number, samples, what.scorer(engine, samples))
    columns["source_images"] = [[phases.png_bytes(image) for image in example.sources] for example in each]
    columns |= {name: [seconds] * len(each) for name, seconds in timed.figures().items()}
    with storing(f"batch {number} of samples", path):
        write_trajectory(path, made, columns)
