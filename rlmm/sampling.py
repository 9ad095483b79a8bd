"""Images from a checkpoint, as a grid: what `rlmm sample` draws."""

from collections.abc import Sequence

from PIL import Image

from rlmm.config.engines import TorchEngineConfig
from rlmm.config.masked import UnmaskingConfig
from rlmm.config.policy import CheckpointPolicy
from rlmm.config.sampling import Sampling
from rlmm.data import Example
from rlmm.policies.families.loading import checkpoint_codec, load_policy
from rlmm.policies.responses import response_of
from rlmm.seeds import derive
from rlmm.train import experience as phases
from rlmm.train.engines import build_engine
from rlmm.train.processes import device
from rlmm.train.tokens import ImageTokens
from rollouts.contract import Layout

GAP = 4


def sample_grid(
    source: CheckpointPolicy,
    prompts: Sequence[str],
    samples: int,
    *,
    temperature: float,
    guidance_scale: float,
    seed: int,
    steps: int | None = None,
    order: str = "random",
) -> Image.Image:
    """One row a prompt, one column a sample. The same seed draws the same images. `steps` and `order`: how a masked
    policy reveals them; by default in a quarter as many steps as there are positions.

    Raises ValueError on an empty prompt and on a source that is no checkpoint.
    """
    empty = [i for i, prompt in enumerate(prompts) if not prompt.strip()]
    if empty or not prompts:
        raise ValueError(f"prompt {empty[0] + 1 if empty else 1} is empty; give each prompt some text")
    policy, codec = load_policy(source.path, source), checkpoint_codec(source).to(device())
    policy.model.eval()
    policy.to(device())
    codec.eval()
    unmasking = _unmasking(policy.layout, steps, order)
    sampling = Sampling(temperature=temperature, guidance_scale=guidance_scale, unmasking=unmasking)
    response, tokens = response_of(policy, sampling), ImageTokens(codec)
    requests = [
        phases.request_for(
            response,
            tokens,
            Example(prompt),
            str(p),
            [derive(seed, "sample", p, s) for s in range(samples)],
        )
        for p, prompt in enumerate(prompts)
    ]
    made = phases.generate(build_engine(TorchEngineConfig(), policy), response, requests, policy.model)
    return grid(phases.decode_images(codec, policy.layout, made), columns=samples)


def _unmasking(layout: Layout, steps: int | None, order: str) -> UnmaskingConfig | None:
    if layout.mask is None:
        if steps is not None or order != "random":
            raise ValueError("steps and order are of masked policies, and this one decides one token after the other")
        return None
    default = max(1, len(layout.grid.decided()) // 4)
    return UnmaskingConfig.model_validate({"steps": steps or default, "order": order})


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size on a light sheet."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), (226, 226, 226))
    for i, image in enumerate(images):
        place = (GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP))
        sheet.paste(image.convert("RGB"), place)
    return sheet
