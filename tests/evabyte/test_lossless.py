"""Losslessness at length: thousands of random cases against `generate`, and distributions against the exact ones."""

import itertools

import pytest
import torch
from goldens_io import load_golden
from tiny import pad_left, random_ids, tiny_model
from transformers import LogitsProcessorList

from evabyte.byte_tree import TreeShape

pytestmark = pytest.mark.slow

DRAFTS = ["chain", "tree31", "tree95", "dynamic", "lookup", "dynamic+lookup", "chain+lookup"]
PROCESSORS = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 3},
    {"bad_words_ids": [[70, 80], [100], [200, 201, 202]]},
    {"suppress_tokens": list(range(64, 128))},
    {"begin_suppress_tokens": list(range(64, 200))},
    {"sequence_bias": [[[90], -5.0], [[91, 92], 6.0]]},
]
WITH_END = [
    {"min_new_tokens": 9},
    {"min_length": 20},
    {"forced_eos_token_id": 150},
    {"exponential_decay_length_penalty": (4, 1.5)},
]
WARPERS = [
    {"top_k": 0},
    {"temperature": 0.7},
    {"top_k": 4, "temperature": 1.4},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.2},
]


class Cases:
    """Random choices, the same at every run."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choose(self, options):
        return options[self.number(0, len(options) - 1)]

    def tree(self, heads):
        known = [()]
        for _ in range(self.number(0, 12)):
            path = (*self.choose(known), self.number(0, 3))
            if path not in known and len(path) < heads:
                known.append(path)
        return TreeShape.from_paths(known[1:]).paths

    def model_and_prompts(self, batch):
        """A random tiny model and bytes, or the trained one and pieces of what it writes."""
        if self.number(0, 2):
            model = tiny_model(*self.choose([(16, 4), (6, 3), (4, 2), (32, 8)]))
            return model, [random_ids(self.number(1, 40), seed=self.number(0, 9999)) for _ in range(batch)]
        golden = load_golden("multibyte_w256_c8")
        text = golden["out.p509.greedy"][0]
        starts = [self.number(0, 250) for _ in range(batch)]
        return golden.model(), [text[start : start + self.number(1, 280)] for start in starts]


@pytest.mark.parametrize("block", range(20))
def test_greedy_equals_generate(block):
    """100 cases a block: models, batches, paddings, drafts, processors, ends of text mid-run."""
    cases = Cases(block)
    for _ in range(100):
        model, rows = cases.model_and_prompts(cases.number(1, 4))
        ids, mask = pad_left(rows)
        end = {"eos_token_id": sorted({cases.number(64, 319) for _ in range(cases.number(1, 40))})}
        processors = cases.choose(
            [*({**p, "eos_token_id": None} for p in PROCESSORS), *({**p, **end} for p in WITH_END), end]
        )
        how = {"attention_mask": mask, "do_sample": False, "max_new_tokens": cases.number(1, 40), **processors}
        draft = {"draft": cases.choose(DRAFTS)}
        if cases.number(0, 3) == 0:
            draft = {"medusa_choices": cases.tree(model.config.num_pred_heads)}
        expected = model.generate(ids, **how)
        assert torch.equal(model.multi_byte_generate(ids, **draft, **how), expected), (how, draft)


@pytest.mark.parametrize("block", range(10))
def test_sampling_draws_the_same_bytes(block):
    """50 cases a block at batch 1: the same seed, the same bytes."""
    cases = Cases(1000 + block)
    for _ in range(50):
        model, rows = cases.model_and_prompts(1)
        how = {"max_new_tokens": cases.number(1, 40), "do_sample": True, "eos_token_id": None, **cases.choose(WARPERS)}
        seed, draft = cases.number(0, 10**6), cases.choose(DRAFTS)
        torch.manual_seed(seed)
        expected = model.generate(rows[0][None], **how)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(model.multi_byte_generate(rows[0][None], draft=draft, **how), expected), (how, draft)
        assert torch.equal(torch.get_rng_state(), state)  # and the next call goes on as after `generate`


@pytest.mark.parametrize(
    "warpers",
    [
        {"top_k": 3},
        {"top_k": 4, "top_p": 0.95, "temperature": 2.0},
        {"min_p": 0.2},
        {"temperature": 0.35, "top_k": 4},
    ],
)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("draft", DRAFTS)
def test_sampled_bytes_have_the_exact_distribution(draft, batch, warpers):
    """Chi-square of three sampled bytes against the distribution enumerated without any sampling."""
    model, prompt, draws = tiny_model(), random_ids(1, 15), 2000
    how = {"do_sample": True, "eos_token_id": None, "top_k": 0, **warpers}
    config = model._prepare_generation_config(None, **how)[0]
    processors: LogitsProcessorList = model._get_logits_processor(config, input_ids_seq_length=15, device="cpu")

    def distribution(ids):
        with torch.no_grad():
            probs = processors(ids[None], model(ids[None], use_cache=False).logits[:, -1])[0].softmax(-1)
        kept = probs.nonzero().flatten().tolist()
        return {byte: probs[byte].item() for byte in kept}

    expected = {(): 1.0}
    for _ in range(3):
        expected = {
            (*path, byte): p * q
            for path, p in expected.items()
            for byte, q in distribution(torch.cat((prompt[0], torch.tensor(path, dtype=torch.int64)))).items()
        }
    torch.manual_seed(0)
    counts = dict.fromkeys(expected, 0)
    rows_at_once = draws if batch > 1 else 1
    for _ in range(draws // rows_at_once if batch > 1 else 300):
        ids = prompt.repeat(batch, 1) if batch > 1 else prompt
        repeats = rows_at_once // batch if batch > 1 else 1
        out = model.multi_byte_generate(ids, max_new_tokens=3, draft=draft, num_return_sequences=repeats, **how)
        for row in out[:, 15:].tolist():
            counts[tuple(row)] += 1  # a KeyError would be bytes that cannot be sampled
    total = sum(counts.values())
    # Rare paths together, so that every expected count is large enough for the statistic.
    ordered = sorted(expected, key=expected.get, reverse=True)
    frequent = [path for path in ordered if total * expected[path] >= 8]
    observed = [counts[path] for path in frequent] + [total - sum(counts[path] for path in frequent)]
    wanted = [total * expected[path] for path in frequent]
    wanted.append(max(total - sum(wanted), 1e-9))
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    degrees = len(wanted) - 1
    # Wilson and Hilferty: the 99.99 % quantile of chi-square.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_row_order_and_neighbours_do_not_matter():
    """Batch invariance: a row's greedy bytes are the same alone, among others, and in any place."""
    model = tiny_model()
    rows = [random_ids(n, seed=n) for n in (3, 11, 17, 30)]
    how = {"do_sample": False, "eos_token_id": list(range(64, 84)), "max_new_tokens": 40}
    alone = [model.multi_byte_generate(row[None], **how)[0, len(row) :].tolist() for row in rows]
    for order in itertools.permutations(range(4)):
        ids, mask = pad_left([rows[place] for place in order])
        together = model.multi_byte_generate(ids, attention_mask=mask, **how)[:, ids.shape[1] :].tolist()
        for place, written in zip(order, together, strict=True):
            assert written[: len(alone[place])] == alone[place]
