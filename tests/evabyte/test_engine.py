"""The engine: whatever joins and leaves, each request gets what `generate` gives it alone."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny_model
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "byte_llama"))

from engine_cases import FEATURE, GREEDY, MODELS, Prophet, Wish, alone, check, model_named, new_engine, wishes

from evabyte import EvaByteTokenizer
from evabyte.byte_tree import DraftTrees
from evabyte.drafters import UnionDrafter, make_drafter


@settings(max_examples=15)
@given(
    wishes=st.lists(wishes, min_size=1, max_size=7),
    rows=st.integers(1, 4),
    piece=st.integers(1, 50),
)
def test_requests_that_come_and_go(wishes, rows, piece):
    draft = Prophet("EvaByte", wishes)
    check(new_engine(max_batch_size=rows, prefill_chunk_size=piece, draft=draft), "EvaByte", wishes)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    name=st.sampled_from(list(MODELS)),
    wishes=st.lists(wishes, min_size=1, max_size=9),
    rows=st.integers(1, 5),
    piece=st.integers(1, 50),
    nodes=st.one_of(st.none(), st.integers(1, 60)),
    draft=st.sampled_from([None, "chain", "tree31", "lookup", "dynamic+lookup", "chain+lookup", Prophet]),
)
def test_requests_that_come_and_go_in_every_model(name, wishes, rows, piece, nodes, draft):
    draft = Prophet(name, wishes) if draft is Prophet else draft
    engine = new_engine(name, max_batch_size=rows, prefill_chunk_size=piece, nodes_per_step=nodes, draft=draft)
    check(engine, name, wishes)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.compatibility(FEATURE, name), id=name) for name in MODELS]
)
def test_each_request_gets_what_generate_gives_it_alone(name):
    lengths = [(3, 30), (60, 9), (17, 20), (1, 1), (44, 25), (16, 40)]
    wishes = [
        Wish(length, count, seed=n, arrives=2 * n, sampled=n % 2 == 1) for n, (length, count) in enumerate(lengths)
    ]
    check(new_engine(name, max_batch_size=3, prefill_chunk_size=20), name, wishes)
    check(new_engine(name, max_batch_size=3, prefill_chunk_size=20, draft=Prophet(name, wishes)), name, wishes)


SAMPLERS = {
    "plain": {},
    "nucleus": {"top_p": 0.7, "temperature": 0.8, "top_k": 0},
    "hot": {"temperature": 1.7, "top_k": 5},
    "looking back": {"repetition_penalty": 1.3, "temperature": 0.9},
    "not twice": {"no_repeat_ngram_size": 2},
    "late end": {"min_new_tokens": 12, "eos_token_id": tuple(range(64, 128))},
}


@pytest.mark.parametrize("do_sample", [True, False])
def test_each_request_has_its_own_settings_and_seed(do_sample):
    engine = new_engine(max_batch_size=8)
    together = {}
    for seed in (0, 1):
        for number, (sampler, settings_) in enumerate(SAMPLERS.items()):
            options = {"max_new_tokens": 20, "do_sample": do_sample, "eos_token_id": None, **settings_}
            if not do_sample:
                options = {key: value for key, value in options.items() if key not in ("temperature", "top_p", "top_k")}
            wish = Wish(9 + number, 20, seed)
            wish.options = options
            together[sampler, seed] = wish, wish.submit(engine, "EvaByte")
    engine.run()
    for wish, request in together.values():
        assert request.result().tolist() == alone("EvaByte", wish.length, wish.seed, **wish.options)


def test_a_request_without_a_seed_draws_one():
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        engine = new_engine()
        requests = [engine.submit(random_ids(4), max_new_tokens=12, do_sample=True) for _ in range(2)]
        texts.append([request.result().tolist() for request in requests])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_temperature_zero_is_greedy():
    request = new_engine().submit(random_ids(9), temperature=0, do_sample=True, max_new_tokens=15, eos_token_id=None)
    assert request.result().tolist() == alone("EvaByte", 9, 0, max_new_tokens=15, **GREEDY)


def test_a_generation_config():
    config = GenerationConfig(do_sample=True, top_k=3, max_new_tokens=15, eos_token_id=None, pad_token_id=0)
    request = new_engine().submit(random_ids(9), generation_config=config, seed=4)
    torch.manual_seed(4)
    assert request.result().equal(tiny_model().generate(random_ids(1, 9)[:, :9], generation_config=config)[0])


def test_stop_strings():
    tokenizer, ids = EvaByteTokenizer(), random_ids(9)
    plain = alone("EvaByte", 9, 0, max_new_tokens=30, **GREEDY)
    stop = next(
        text for n in range(12, 30) if len(text := tokenizer.decode(plain[9 + n : 11 + n])) == 2 and text.isascii()
    )
    how = {"max_new_tokens": 30, "stop_strings": [stop], **GREEDY}
    expected = tiny_model().generate(ids[None], tokenizer=tokenizer, **how)[0]
    assert len(expected) < len(plain)
    engine = new_engine(tokenizer=tokenizer)
    endless = engine.submit(ids, max_new_tokens=30, **GREEDY)
    assert engine.submit(ids, **how).result().equal(expected)
    assert endless.result().tolist() == plain


# -- what a step does ----------------------------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch):
    """Shapes [rows, ids] of the model's calls: ("prompt", shape) or ("trees", shape)."""
    model, calls = model_named("EvaByte"), []
    forward = model.forward

    def look(*args, **kwargs):
        kind = "prompt" if kwargs.get("draft_tree") is None else "trees"
        calls.append((kind, tuple(kwargs["input_ids"].shape)))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", look)
    return calls


def test_one_forward_verifies_the_trees_of_all_rows(forwards):
    engine = new_engine(max_batch_size=4, nodes_per_step=24)
    for seed in range(6):
        engine.submit(random_ids(5, seed=seed), max_new_tokens=10 + 4 * seed, **GREEDY)
    engine.step()
    rows = 4
    while engine.pending:
        del forwards[:]
        engine.step()
        trees = [shape for kind, shape in forwards if kind == "trees"]
        assert len(trees) == 1
        (rows, nodes) = trees[0]
        assert rows <= 4 and nodes == 24 // rows + 1  # the trees share the budget
    assert rows == 1


def test_a_long_prompt_does_not_hold_up_running_rows(forwards):
    engine = new_engine(max_batch_size=4, prefill_chunk_size=10)
    running = engine.submit(random_ids(5), max_new_tokens=60, **GREEDY)
    engine.step()
    late = engine.submit(random_ids(45, seed=1), max_new_tokens=3, **GREEDY)
    while not late.new_ids:
        before = len(running.new_ids)
        del forwards[:]
        engine.step()
        assert sum(length for kind, (_, length) in forwards if kind == "prompt") <= 10
        assert len(running.new_ids) > before
    assert late.result().tolist() == alone("EvaByte", 45, 1, max_new_tokens=3, **GREEDY)


def test_requests_wait_in_order_and_take_the_places_of_those_that_end():
    engine = new_engine(max_batch_size=2)
    requests = [engine.submit(random_ids(5, seed=n), max_new_tokens=4 + n, **GREEDY) for n in range(5)]
    assert {each.status for each in requests} == {"waiting"}
    began = []
    while engine.pending:
        engine.step()
        began += [each.number for each in requests if each.status != "waiting" and each.number not in began]
        assert sum(each.status == "running" for each in requests) <= 2
    assert began == [0, 1, 2, 3, 4]
    assert {each.status for each in requests} == {"done"}


def test_drafters_keep_nothing_of_requests_that_ended():
    drafter = make_drafter("dynamic+lookup", 3, torch.device("cpu"), 1)
    assert isinstance(drafter, UnionDrafter)
    engine = new_engine(draft=drafter, max_batch_size=2)
    ids = random_ids(8).repeat(3)
    requests = [engine.submit(ids, max_new_tokens=9, **GREEDY) for _ in range(3)]
    engine.step()
    assert drafter.second._seen
    engine.run()
    assert not drafter.second._seen and not drafter.second._read
    assert len({tuple(request.new_ids) for request in requests}) == 1


def test_a_drafter_of_ones_own():
    class Nothing:
        def draft(self, context):
            return DraftTrees(context.root[:, None], torch.full((1, 1), -1), 0)

    engine = new_engine(draft=Nothing())
    requests = [engine.submit(random_ids(9, seed=n), max_new_tokens=8, **GREEDY) for n in range(2)]
    for n, request in enumerate(requests):
        assert request.result().tolist() == alone("EvaByte", 9, n, max_new_tokens=8, **GREEDY)
