"""What transformers' tests know of in-tree models by name, told of ours."""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES


def declare(model_type: str, base: type, causal_lm: type) -> None:
    """Base models have no loss to train on, causal ones have: the tests go by the names of the classes."""
    MODEL_MAPPING_NAMES[model_type] = base.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = causal_lm.__name__
