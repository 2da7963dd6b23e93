"""Byte-level Llama in transformers' own tests; started by `run.py` beside this file."""

import unittest

from auto_names import declare
from small_expansion import ExpandedModelTest, expansion_fields
from tests.causal_lm_tester import CausalLMModelTester

from byte_llama import ByteLlamaConfig, ByteLlamaForCausalLM, ByteLlamaModel

declare("byte_llama", ByteLlamaModel, ByteLlamaForCausalLM)


class ByteLlamaModelTester(CausalLMModelTester):
    base_model_class = ByteLlamaModel
    config_class = ByteLlamaConfig
    causal_lm_class = ByteLlamaForCausalLM

    def __init__(self, parent):
        super().__init__(parent, **expansion_fields())


class ByteLlamaModelTest(ExpandedModelTest, unittest.TestCase):
    model_tester_class = ByteLlamaModelTester
    model_split_percents = [0.5, 0.7, 0.8]  # as for the in-tree Llama
    _torch_compile_train_cls = ByteLlamaForCausalLM
