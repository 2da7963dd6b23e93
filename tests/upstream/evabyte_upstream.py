"""EvaByte in transformers' own tests; started by `run.py` beside this file."""

import unittest

from auto_names import declare
from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester

from evabyte import EvaByteConfig, EvaByteForCausalLM, EvaByteModel

declare("evabyte", EvaByteModel, EvaByteForCausalLM)


class EvaByteModelTester(CausalLMModelTester):
    base_model_class = EvaByteModel
    config_class = EvaByteConfig
    causal_lm_class = EvaByteForCausalLM

    def __init__(self, parent):
        # Windows so small that the suite's short inputs cross their borders.
        super().__init__(parent, window_size=4, chunk_size=2, num_pred_heads=3)


class EvaByteModelTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class = EvaByteModelTester
    has_attentions = False  # EVA weighs summaries besides tokens: there is no [N, N] matrix of weights to return
    _torch_compile_train_cls = EvaByteForCausalLM

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """The suite expects a slot per token; EVA keeps an open window and summaries, and counts each row's tokens."""
        for layer in past_key_values.layers:
            self.assertEqual(list(layer.lengths), [seq_length] * batch_size)

    def test_resize_embeddings_untied(self):
        """The suite expects an output layer of `vocab_size` rows: that of one prediction head."""
        self.model_tester.num_pred_heads = 1
        super().test_resize_embeddings_untied()
