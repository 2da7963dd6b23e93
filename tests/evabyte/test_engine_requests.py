"""The engine's requests: threads, callbacks, cancelling, failures, and what is refused."""

import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from tiny import random_ids, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).parents[1] / "byte_llama"))
import small_models
from engine_cases import GREEDY, Prophet, Wish, alone, ids_for, model_named, new_engine

from evabyte.engine import ByteEngine

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
