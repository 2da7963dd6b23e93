"""`resize_token_embeddings`, with several prediction heads in one output layer."""

import pytest
import torch
from tiny import fresh_model, logits_alone, random_ids


@pytest.mark.parametrize("change", [-10, 7])
def test_every_head_keeps_its_rows(change, tmp_path):
    model, ids = fresh_model(), random_ids(21) - 10
    before = logits_alone(model, ids)
    model.resize_token_embeddings(320 + change)
    after = logits_alone(model, ids)
    kept = min(320, 320 + change)
    assert after.shape == (21, model.config.num_pred_heads, 320 + change)
    torch.testing.assert_close(after[..., :kept], before[..., :kept])

    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_alone(type(model).from_pretrained(tmp_path), ids), after)


def test_padding_to_a_multiple():
    model = fresh_model()
    model.resize_token_embeddings(pad_to_multiple_of=128)
    assert model.lm_head.out_features == model.lm_head.weight.shape[0] == model.config.num_pred_heads * 384
