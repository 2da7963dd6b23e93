"""peft's learned prompts: those that leave the embedding of bytes to the model work, the others are refused."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from small_models import KINDS, fresh_model, letters

FEATURE = "Prompt tuning, p-tuning (peft)"
REFUSED = "peft's prompt tuning and p-tuning embed the bytes themselves"
LEARNED = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("llama", marks=pytest.mark.compatibility(FEATURE, "byte Llama", refused=REFUSED)),
        pytest.param("gemma2", marks=pytest.mark.compatibility(FEATURE, "byte Gemma 2", refused=REFUSED)),
    ],
)
@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
def test_prompts_that_would_leave_out_the_subwords_are_refused(kind, config):
    model, ids = get_peft_model(fresh_model(kind), config(**LEARNED)), letters(2, 9)
    with pytest.raises(NotImplementedError, match=rf"{REFUSED}.* Use prefix tuning .* or LoRA"):
        model(ids, labels=ids)
    with pytest.raises(NotImplementedError, match=REFUSED):
        model.generate(input_ids=ids, max_new_tokens=3)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_begin_with_rows_of_the_embedding(kind):
    model = fresh_model(kind)
    learned = get_peft_model(model, PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **LEARNED))
    rows = learned.prompt_encoder["default"].embedding.weight
    table = model.get_input_embeddings()(torch.arange(model.config.vocab_size))
    assert all((table == row).all(-1).any() for row in rows)


def test_without_subwords_prompt_tuning_works():
    model = get_peft_model(fresh_model(expand_input_ids=False), PromptTuningConfig(**LEARNED))
    ids = letters(2, 9)
    assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prefix_tuning(kind):
    model = get_peft_model(fresh_model(kind), PrefixTuningConfig(**LEARNED)).eval()
    ids = letters(1, 12)
    for parameter in model.prompt_encoder.parameters():
        parameter.normal_()
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, eos_token_id=None)
    for _ in range(8):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(output, ids)
