"""Published model classes that transformers lacks, written as its own are.

Names of classes, settings and weights are the published ones: a checkpoint loads here, and what is saved here loads
there. LlamaGen's are transformers' way of naming them: it was published as pickles without a configuration.
"""

from collections.abc import Mapping

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlmm.policies.models.llada import LLaDAConfig, LLaDAForMultiModalGeneration, MMadaConfig, MMadaModelLM
from rlmm.policies.models.llamagen import LlamaGenConfig, LlamaGenForImageGeneration
from rlmm.policies.models.showo import Showo, ShowoConfig

CLASSES: Mapping[str, type[PreTrainedModel]] = {
    "MMadaModelLM": MMadaModelLM,
    "LLaDAForMultiModalGeneration": LLaDAForMultiModalGeneration,
    "LLaDAModelLM": LLaDAForMultiModalGeneration,
    "Showo": Showo,
    "LlamaGenForImageGeneration": LlamaGenForImageGeneration,
}
"""Name in a checkpoint's config.json -> class. Their configurations are known to transformers' AutoConfig from here on,
before any code that a checkpoint brings along, which is never run."""

_PAIRS = (
    (MMadaConfig, MMadaModelLM), (LLaDAConfig, LLaDAForMultiModalGeneration), (ShowoConfig, Showo),
    (LlamaGenConfig, LlamaGenForImageGeneration),
)  # fmt: skip
for _config, _model in _PAIRS:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
