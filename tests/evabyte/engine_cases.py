"""What the tests of the engine share: models, requests as tests describe them, and what each gets alone."""

import sys
from functools import cache
from pathlib import Path

import torch
from hypothesis import strategies as st
from tiny import random_ids, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "byte_llama"))
import small_models

from evabyte.byte_tree import DraftTrees
from evabyte.engine import ByteEngine

FEATURE = "Engine: requests join and leave, multibyte"
GREEDY = {"do_sample": False, "eos_token_id": None}
MODELS = {"EvaByte": None, "byte Llama": "llama", "byte Gemma 2": "gemma2"}


@cache
def model_named(name):
    """Do not change it: tests share it."""
    kind = MODELS[name]
    return tiny_model() if kind is None else small_models.fresh_model(kind, num_pred_heads=4)


def ids_for(name, length, seed=0):
    return (random_ids if name == "EvaByte" else small_models.letters)(length, seed=seed)


@cache
def _alone(name, length, seed, options):
    torch.manual_seed(seed)
    ids = ids_for(name, length, seed)
    return model_named(name).generate(ids[None], **dict(options))[0].tolist()


def alone(name, length, seed, **options):
    """What `generate` writes after a prompt, from a seed."""
    return _alone(name, length, seed, tuple(options.items()))


def new_engine(name="EvaByte", **sizes):
    return ByteEngine(model_named(name), **{"max_length": 200, **sizes})


class Wish:
    """A request as a test describes it."""

    def __init__(self, length, count, seed, arrives=0, sampled=False, ends=0):
        self.length, self.seed, self.arrives = length, seed, arrives
        self.options = {"max_new_tokens": count, "do_sample": sampled, "eos_token_id": None}
        if ends:  # some of the most frequent ids end the text
            self.options["eos_token_id"] = tuple(range(64, 64 + ends))

    def submit(self, engine, name):
        options = {**self.options, "eos_token_id": self.options["eos_token_id"] and list(self.options["eos_token_id"])}
        return engine.submit(ids_for(name, self.length, self.seed), seed=self.seed, **options)


class Prophet:
    """Drafts what a request will write, behind a branch that is wrong: up to 5 bytes, then wrong ones.

    A random model agrees with nobody; with this, steps bring 1 to 6 bytes, by paths that are not the tree's first.
    """

    def __init__(self, name, wishes):
        self.truths = [alone(name, wish.length, wish.seed, **wish.options) for wish in wishes]

    def draft(self, context):
        wrong = (context.root + 1) % 8
        trees = DraftTrees(context.root[:, None], torch.full_like(context.root[:, None], -1), 0)
        trees = trees.with_chains(wrong[:, None].expand(-1, 2), torch.full_like(wrong, 2), 0)
        chains = []
        for text in context.texts:
            truth = next((truth for truth in self.truths if truth[: len(text)] == text), text)
            chain = truth[len(text) :][: len(text) * 7 % 6]
            chains.append(chain + [3] * (6 - len(chain)))
        return trees.with_chains(torch.tensor(chains), torch.full_like(wrong, 6), 0)


def check(engine, name, wishes):
    """Let requests arrive between steps, and compare each with `generate`."""
    requests, step = {}, 0
    while len(requests) < len(wishes) or engine.pending:
        for number, wish in enumerate(wishes):
            if wish.arrives <= step and number not in requests:
                requests[number] = wish.submit(engine, name)
        engine.step()
        step += 1
    for number, wish in enumerate(wishes):
        assert requests[number].status == "done"
        assert requests[number].result().tolist() == alone(name, wish.length, wish.seed, **wish.options)


wishes = st.builds(
    Wish,
    length=st.one_of(st.sampled_from([1, 15, 16, 17, 31, 32, 33]), st.integers(1, 60)),  # about window borders
    count=st.integers(1, 40),
    seed=st.integers(0, 3),
    arrives=st.integers(0, 12),
    sampled=st.booleans(),
    ends=st.sampled_from([0, 0, 8, 32]),
)
