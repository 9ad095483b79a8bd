"""Published model classes that transformers lacks, written as its own are.

Names of classes, settings and weights are the published ones: a checkpoint loads here, and what is saved here loads
there.
"""

from collections.abc import Mapping

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlmm.policies.models.llada import LLaDAConfig, LLaDAForMultiModalGeneration, MMadaConfig, MMadaModelLM

CLASSES: Mapping[str, type[PreTrainedModel]] = {
    "MMadaModelLM": MMadaModelLM,
    "LLaDAForMultiModalGeneration": LLaDAForMultiModalGeneration,
    "LLaDAModelLM": LLaDAForMultiModalGeneration,
}
"""Name in a checkpoint's config.json -> class. Their configurations are known to transformers' AutoConfig from here on,
before any code that a checkpoint brings along, which is never run."""

for _config, _model in ((MMadaConfig, MMadaModelLM), (LLaDAConfig, LLaDAForMultiModalGeneration)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
