"""The in-tree Llama in transformers' own tests, to compare with; started by `run.py --reference llama`."""

import unittest

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
from transformers import LlamaForCausalLM, LlamaModel


class LlamaModelTester(CausalLMModelTester):
    base_model_class = LlamaModel


class LlamaModelTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class = LlamaModelTester
    model_split_percents = [0.5, 0.7, 0.8]
    _torch_compile_train_cls = LlamaForCausalLM
