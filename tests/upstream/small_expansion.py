"""A subword expansion for the vocabulary of transformers' test models."""

import random

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
