"""Byte-level Gemma 2 in transformers' own tests; started by `run.py` beside this file."""

import unittest

from auto_names import declare
from small_expansion import ExpandedModelTest, expansion_fields
from tests.causal_lm_tester import CausalLMModelTester

from byte_llama import ByteGemma2Config, ByteGemma2ForCausalLM, ByteGemma2Model

declare("byte_gemma2", ByteGemma2Model, ByteGemma2ForCausalLM)


class ByteGemma2ModelTester(CausalLMModelTester):
    base_model_class = ByteGemma2Model
    config_class = ByteGemma2Config
    causal_lm_class = ByteGemma2ForCausalLM

    def __init__(self, parent):
        super().__init__(parent, **expansion_fields())


class ByteGemma2ModelTest(ExpandedModelTest, unittest.TestCase):
    model_tester_class = ByteGemma2ModelTester
    _is_stateful = True  # as for the in-tree Gemma 2, and so is the next line
    model_split_percents = [0.5, 0.6]
