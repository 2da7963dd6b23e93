"""EvaByte in transformers' own tests; started by `run.py` beside this file."""

import unittest

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester

from evabyte import EvaByteConfig, EvaByteForCausalLM, EvaByteModel


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
