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
    _torch_compile_train_cls = EvaByteForCausalLM

    @property
    def has_attentions(self):
        """EVA weighs summaries besides tokens: there is no [N, N] matrix of weights for the suite to ask for.

        Tests of padding and of attention implementations ask for none, but are skipped where there are no attentions.
        """
        asking = ("output", "assisted", "prompt_lookup", "retain_grad")
        return not any(word in self._testMethodName for word in asking)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """The suite expects keys and values of every token; EVA keeps an open window and summaries."""
        self.assertEqual(past_key_values.get_seq_length(), seq_length)
        for layer in past_key_values.layers:
            self.assertEqual(len(layer.keys), batch_size)

    # The suite expects an output layer of `vocab_size` rows, which can be tied: that of one prediction head.

    def test_resize_embeddings_untied(self):
        self.model_tester.num_pred_heads = 1
        super().test_resize_embeddings_untied()

    def test_tied_weights_keys(self):
        self.model_tester.num_pred_heads = 1
        super().test_tied_weights_keys()
