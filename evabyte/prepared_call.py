"""What `generate` makes of a call's arguments, for those who decode by a loop of their own."""

from typing import Any, NamedTuple

from torch import Tensor
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList


class PreparedCall(NamedTuple):
    """The arguments of a decoding method, as `generate` checks and completes them."""

    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig


def prepared_call(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> PreparedCall:
    """A decoding method that hands its arguments back."""
    return PreparedCall(input_ids, logits_processor, stopping_criteria, generation_config)
