"""The engine: whatever joins and leaves, each request gets what `generate` gives it alone."""

import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).parents[1] / "byte_llama"))
import small_models

from evabyte import EvaByteTokenizer
from evabyte.byte_tree import DraftTrees
from evabyte.drafters import UnionDrafter, make_drafter
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


# -- what a caller sees --------------------------------------------------------------------------------------------


def test_bytes_as_they_come():
    engine, pieces = new_engine(draft=Prophet("EvaByte", [Wish(9, 20, 0)])), []
    request = engine.submit(random_ids(9), max_new_tokens=20, on_bytes=pieces.append, **GREEDY)
    other = engine.submit(random_ids(9, seed=1), max_new_tokens=20, **GREEDY)
    iterator = iter(request)
    first = next(iterator)
    assert request.status == "running" and request.new_ids[0] == first
    assert not other.ended
    rest = list(iterator)
    expected = alone("EvaByte", 9, 0, max_new_tokens=20, **GREEDY)[9:]
    assert [first, *rest] == expected == request.new_ids == [each for piece in pieces for each in piece]
    assert list(request) == expected  # again, from the first on
    assert max(map(len, pieces)) > 3


def test_threads():
    engine, found, failures = new_engine(max_batch_size=3), {}, []

    def work(seed):
        try:
            for again in range(3):
                request = engine.submit(random_ids(9, seed=seed), max_new_tokens=10, **GREEDY)
                found[seed, again] = list(request) if again % 2 else request.result()[9:].tolist()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert len(found) == 15
    for (seed, _), new in found.items():
        assert new == alone("EvaByte", 9, seed, max_new_tokens=10, **GREEDY)[9:]


def test_waiting_for_another_thread_may_time_out():
    engine, inside, go = new_engine(), threading.Event(), threading.Event()

    def hold(new):
        inside.set()
        go.wait(60)

    slow = engine.submit(random_ids(3), max_new_tokens=1, on_bytes=hold, **GREEDY)
    thread = threading.Thread(target=slow.result)
    thread.start()
    assert inside.wait(60)
    try:
        with pytest.raises(TimeoutError, match=r"0\.05 seconds"):
            engine.submit(random_ids(3), max_new_tokens=1, **GREEDY).result(timeout=0.05)
    finally:
        go.set()
        thread.join(60)
    engine.run()
    assert slow.status == "done"


def test_callbacks_may_submit_but_not_wait():
    engine, second, errors = new_engine(), [], []

    def more(new):
        if not second:
            second.append(engine.submit(random_ids(9, seed=1), max_new_tokens=5, **GREEDY))
            with pytest.raises(RuntimeError, match="`on_bytes` runs within a step") as error:
                second[0].result()
            errors.append(error)

    engine.submit(random_ids(9), max_new_tokens=5, on_bytes=more, **GREEDY).result()
    assert errors
    assert second[0].result().tolist() == alone("EvaByte", 9, 1, max_new_tokens=5, **GREEDY)


# -- requests that do not end by themselves ------------------------------------------------------------------------


def test_cancelling():
    engine = new_engine(max_batch_size=2, prefill_chunk_size=10)
    running = engine.submit(random_ids(9), max_new_tokens=100, **GREEDY)
    neighbour = engine.submit(random_ids(5, seed=1), max_new_tokens=30, **GREEDY)
    engine.step(), engine.step()
    reading = engine.submit(random_ids(50, seed=2), max_new_tokens=5, **GREEDY)
    running.cancel()
    engine.step(), engine.step()
    assert running.status == "cancelled" and reading.status == "waiting"
    waiting = engine.submit(random_ids(4), max_new_tokens=5, **GREEDY)
    reading.cancel(), waiting.cancel()
    written = running.result().tolist()
    assert 9 < len(written) < 100 and written == alone("EvaByte", 9, 0, max_new_tokens=100, **GREEDY)[: len(written)]
    assert list(reading) == list(waiting) == []
    assert neighbour.result().tolist() == alone("EvaByte", 5, 1, max_new_tokens=30, **GREEDY)
    assert reading.status == waiting.status == "cancelled" and not engine.pending
    neighbour.cancel()
    engine.step()
    assert neighbour.status == "done"


class Failing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 12:
            raise ArithmeticError("processor")
        return scores


class FailingStop(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 12:
            raise ArithmeticError("criterion")
        return torch.zeros(len(input_ids), dtype=torch.bool)


def fail(new):
    raise ArithmeticError("callback")


@pytest.mark.parametrize(
    ("why", "options", "bytes_before"),
    [
        ("callback", {"on_bytes": fail}, 1),
        ("processor", {"logits_processor": LogitsProcessorList([Failing()])}, None),
        ("criterion", {"stopping_criteria": StoppingCriteriaList([FailingStop()])}, None),
    ],
)
def test_a_request_that_fails_takes_no_other_down(why, options, bytes_before):
    engine = new_engine()
    before = engine.submit(random_ids(9, seed=1), max_new_tokens=20, **GREEDY)
    failing = engine.submit(random_ids(9), max_new_tokens=20, **options, **GREEDY)
    behind = engine.submit(random_ids(9, seed=2), max_new_tokens=20, **GREEDY)
    engine.run()
    assert failing.status == "failed"
    for look in (failing.result, lambda: list(failing)):
        with pytest.raises(ArithmeticError, match=why):
            look()
    expected = alone("EvaByte", 9, 0, max_new_tokens=20, **GREEDY)[9:]
    assert failing.new_ids == expected[: len(failing.new_ids)] and len(failing.new_ids) < 20
    assert bytes_before is None or len(failing.new_ids) == bytes_before
    for seed, request in ((1, before), (2, behind)):
        assert request.result().tolist() == alone("EvaByte", 9, seed, max_new_tokens=20, **GREEDY)


def no_memory(*args, **kwargs):
    raise MemoryError("none left")


def test_a_model_that_fails(monkeypatch):
    model = tiny.fresh_model()
    engine = ByteEngine(model, max_length=100)
    running = engine.submit(random_ids(9), max_new_tokens=20, **GREEDY)
    engine.step()
    working = model.forward

    monkeypatch.setattr(model, "forward", no_memory)
    reading = engine.submit(random_ids(9), max_new_tokens=20, **GREEDY)
    with pytest.raises(MemoryError):
        engine.step()
    assert running.status == reading.status == "failed"
    monkeypatch.setattr(model, "forward", working)
    again = engine.submit(random_ids(9), max_new_tokens=20, **GREEDY)
    assert again.result().tolist() == alone("EvaByte", 9, 0, max_new_tokens=20, **GREEDY)
    for request in (running, reading):
        with pytest.raises(MemoryError):
            request.result()


def test_a_batch_that_cannot_take_rows_in(monkeypatch):
    model = tiny.fresh_model()
    engine = ByteEngine(model, max_length=100)
    arriving = engine.submit(random_ids(9), max_new_tokens=20, **GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(model, "_append_rows", no_memory)
        with pytest.raises(MemoryError):
            arriving.result()
    assert arriving.status == "failed" and not engine.pending
    again = engine.submit(random_ids(9), max_new_tokens=20, **GREEDY)
    assert again.result().tolist() == alone("EvaByte", 9, 0, max_new_tokens=20, **GREEDY)


@pytest.mark.parametrize("name", ["byte Llama", "byte Gemma 2"])
def test_the_only_row_fails(name):
    engine = new_engine(name)
    failing = engine.submit(
        ids_for(name, 11), max_new_tokens=20, logits_processor=LogitsProcessorList([Failing()]), **GREEDY
    )
    with pytest.raises(ArithmeticError):
        failing.result()
    request = engine.submit(ids_for(name, 9), max_new_tokens=20, **GREEDY)
    assert request.result().tolist() == alone(name, 9, 0, max_new_tokens=20, **GREEDY)


@pytest.mark.parametrize("do_sample", [False, True])
def test_drafts_are_as_good_as_alone(do_sample):
    """Each forward brings a request as many bytes as it brings it alone, whoever came or left."""
    model, options = model_named("byte Llama"), {"do_sample": do_sample, "eos_token_id": None}
    engine = new_engine("byte Llama", max_batch_size=3, draft="tree31")
    pieces, lengths = [[] for _ in range(5)], [9, 30, 4, 17, 12]
    for n, length in enumerate(lengths):
        ids = small_models.letters(length, seed=n)
        engine.submit(ids, max_new_tokens=20 + 5 * n, seed=n, on_bytes=pieces[n].append, **options)
    engine.run()
    for n, length in enumerate(lengths):
        torch.manual_seed(n)
        ids, how = small_models.letters(1, length, seed=n), {"max_new_tokens": 20 + 5 * n, **options}
        _, counts = model.multi_byte_generate(ids, draft="tree31", return_acc_lengths=True, **how)
        expected = counts[0].tolist()
        assert max(expected) > 1
        assert [len(piece) for piece in pieces[n]] == expected


def test_byte_llama_with_eva_layers():
    sizes = {"num_hidden_layers": 3, "eva_layers": [0, 2], "eva_window_size": 8, "eva_chunk_size": 4}
    model = small_models.fresh_model("llama", num_pred_heads=3, **sizes)
    engine = ByteEngine(model, max_batch_size=2, prefill_chunk_size=11)
    ids = [small_models.letters(n, seed=n) for n in (9, 30, 8, 15)]
    requests = [engine.submit(each, max_new_tokens=12 + n, **GREEDY) for n, each in enumerate(ids)]
    for n, (each, request) in enumerate(zip(ids, requests, strict=True)):
        assert request.result().equal(model.generate(each[None], max_new_tokens=12 + n, **GREEDY)[0])


@pytest.mark.parametrize("draft", ["self", "subword", "lookup"])
def test_drafts_of_byte_llama(draft):
    model = small_models.fresh_model("llama", vocab_size=40)  # has the space, and no heads beyond its own
    model.skip_layers([1])
    engine = ByteEngine(model, max_batch_size=2, draft=draft)
    ids = [small_models.letters(n, seed=n) for n in (9, 30, 4)]
    requests = [engine.submit(each, max_new_tokens=15, **GREEDY) for each in ids]
    for each, request in zip(ids, requests, strict=True):
        assert request.result().equal(model.generate(each[None], max_new_tokens=15, **GREEDY)[0])


def test_closing():
    with new_engine(max_batch_size=1) as engine:
        done = engine.submit(random_ids(9), max_new_tokens=2, **GREEDY)
        done.result()
        running = engine.submit(random_ids(9), max_new_tokens=50, **GREEDY)
        waiting = engine.submit(random_ids(9), max_new_tokens=50, **GREEDY)
        engine.step()
    assert [each.status for each in (done, running, waiting)] == ["done", "cancelled", "cancelled"]
    assert running.new_ids and not engine.pending
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(random_ids(9), max_new_tokens=5)
    assert not engine.step()


def test_time_that_is_up():
    request = new_engine().submit(
        random_ids(9), max_new_tokens=150, max_time=0.2, on_bytes=lambda new: time.sleep(0.05), **GREEDY
    )
    new = request.result()[9:].tolist()
    assert 0 < len(new) < 150 and new == alone("EvaByte", 9, 0, max_new_tokens=150, **GREEDY)[9 : 9 + len(new)]


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 192}, r"9 ids and up to 192 new ones are 201, more than the engine's `max_length` \(200\)"),
        ({"nonsense": 3}, "nonsense"),
        ({"num_beams": 3}, "beam"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"num_return_sequences": 2, "do_sample": True}, "submit the prompt several times"),
        ({"streamer": None}, "`streamer` is not for an engine: iterate over the request"),
        ({"attention_mask": None}, "`attention_mask` is not for an engine: it takes prompts as ids"),
        ({"past_key_values": None}, "`past_key_values` is not for an engine"),
        ({"draft": "chain"}, "what is drafted is said when the engine is made"),
        ({"cache_implementation": "static"}, "a cache of its own"),
        ({"stop_strings": ["a"]}, "tokenizer"),
    ],
)
def test_options_that_are_refused(options, message):
    engine = new_engine()
    with pytest.raises(ValueError, match=message):
        engine.submit(random_ids(9), **{"max_new_tokens": 5, **GREEDY, **options})
    assert not engine.pending


@pytest.mark.parametrize("ids", [[], torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5), [3, 320], [-1]])
def test_prompts_that_are_refused(ids):
    with pytest.raises(ValueError, match="`input_ids` must"):
        new_engine().submit(ids)


@pytest.mark.parametrize(
    "options",
    [{"max_batch_size": 0}, {"max_length": 0}, {"prefill_chunk_size": 0}, {"nodes_per_step": 0}, {"draft": "guess"}],
)
def test_engines_that_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` "):
        new_engine(**options)


def test_the_length_is_the_models_by_default():
    model = tiny_model()
    assert ByteEngine(model).max_length == model.config.max_position_embeddings
