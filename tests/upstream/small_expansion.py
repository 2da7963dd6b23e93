"""What the tests of both byte-level models share: a subword expansion, and the layer that it adds to caches."""

import copy
import random

from tests.causal_lm_tester import CausalLMModelTest

from byte_llama.byte_history import byte_history

VOCABULARY, SUBWORDS = 99, 60


def expansion_fields() -> dict[str, object]:
    """Configuration fields of an expansion; random inputs match its pairs now and then, its single ids often."""
    choose = random.Random(0)
    paths = [(first,) for first in range(1, VOCABULARY // 2)]
    paths += [(choose.randint(1, VOCABULARY), choose.randint(1, VOCABULARY)) for _ in range(SUBWORDS)]
    paths = list(dict.fromkeys(paths))
    dictionary = {",".join(map(str, path)): 2 + subword for subword, path in enumerate(paths)}
    return {
        "expand_input_ids": True,
        "expand_input_ids_vocab_size": len(paths) + 1,
        "expand_input_ids_maxlen": 16,
        "expand_input_ids_dict": [dictionary, []],
        "num_pred_heads": 2,
    }


class ExpandedModelTest(CausalLMModelTest):
    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """The suite expects a layer per decoder layer; the bytes that subwords are matched on stand behind them."""
        self.assertIs(past_key_values.layers[-1], byte_history(past_key_values))
        decoder = copy.copy(past_key_values)
        decoder.layers = past_key_values.layers[:-1]
        super()._check_past_key_values_for_generate(batch_size, decoder, seq_length, config)
