"""The in-tree Gemma2 in transformers' own tests, to compare with; started by `run.py --reference gemma2`."""

import unittest

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
from transformers import Gemma2Model


class Gemma2ModelTester(CausalLMModelTester):
    base_model_class = Gemma2Model


class Gemma2ModelTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class = Gemma2ModelTester
    _is_stateful = True
    model_split_percents = [0.5, 0.6]
