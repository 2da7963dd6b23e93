"""transformers' own `generate` in its modes, against decoding that uses no cache at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, PAD, fresh_model, letters, logits_alone, tiny_model
from transformers import CompileConfig, DynamicCache

GREEDY = {"do_sample": False, "eos_token_id": None}


def greedy_by_hand(model, ids, count):
    """Greedy ids of one sequence [N], a whole forward each."""
    for _ in range(count):
        ids = torch.cat((ids, logits_alone(model, ids)[-1].argmax()[None]))
    return ids


def pad_left(rows):
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat((torch.full((longest - len(row),), PAD), row)) for row in rows])
    return ids, torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])


@settings(max_examples=15)
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    count=st.integers(1, 12),
    cache=st.sampled_from([None, "static"]),
)
def test_greedy_batches_equal_each_row_alone(kind, lengths, count, cache):
    model = tiny_model(kind)
    rows = [letters(n, seed=row) for row, n in enumerate(lengths)]
    ids, mask = pad_left(rows)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, cache_implementation=cache, disable_compile=True, **GREEDY
    )
    for row, tokens in enumerate(rows):
        assert torch.equal(output[row, ids.shape[1] - len(tokens) :], greedy_by_hand(model, tokens, count))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache(kind):
    model, ids = tiny_model(kind), letters(2, 20)
    cached = model.generate(ids, max_new_tokens=15, **GREEDY)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=15, use_cache=False, **GREEDY))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search(kind, num_beams):
    model = tiny_model(kind)
    ids, mask = pad_left([letters(14), letters(9, seed=1)])
    settings = {"max_new_tokens": 14, "num_beams": num_beams, "num_return_sequences": 2, **GREEDY}
    cached = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_and_several_sequences(kind):
    model, ids = tiny_model(kind), letters(2, 10)
    settings = {"max_new_tokens": 20, "do_sample": True, "num_return_sequences": 3, "eos_token_id": None}
    torch.manual_seed(0)
    cached = model.generate(ids, **settings)
    torch.manual_seed(0)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert cached.shape == (6, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_assisted_decoding_equals_greedy(kind):
    # A window that the text outgrows fails in the assistants of transformers 5.17, for its own Gemma 2 as well.
    window = {"sliding_window": 64} if kind == "gemma2" else {}
    model, prompt = tiny_model(kind, **window), letters(1, 6).repeat(1, 4)
    greedy = model.generate(prompt, max_new_tokens=25, **GREEDY)
    for assistance in (
        {"prompt_lookup_num_tokens": 5},
        {"assistant_model": fresh_model(kind, num_hidden_layers=1, **window)},
        {"assistant_model": fresh_model(kind, **window)},
        {"assistant_early_exit": 1},
    ):
        assert torch.equal(model.generate(prompt, max_new_tokens=25, **assistance, **GREEDY), greedy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefill_chunk_size", [1, 5, 16, 40])
def test_prefill_in_chunks(kind, prefill_chunk_size):
    model = tiny_model(kind)
    ids, mask = pad_left([letters(30), letters(20, seed=1)])
    settings = {"attention_mask": mask, "max_new_tokens": 10, **GREEDY}
    assert torch.equal(
        model.generate(ids, prefill_chunk_size=prefill_chunk_size, **settings), model.generate(ids, **settings)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_with_its_cache(kind):
    model, ids = tiny_model(kind), letters(1, 10)
    settings = {"max_new_tokens": 8, "return_dict_in_generate": True, **GREEDY}
    cache = DynamicCache(config=model.config)
    for turn in range(3):
        output = model.generate(ids, past_key_values=cache, **settings)
        assert torch.equal(output.sequences, model.generate(ids, **settings).sequences)
        cache = output.past_key_values
        ids = torch.cat((output.sequences, letters(1, 5, seed=turn)), dim=1)


def test_stops_at_the_end_of_the_text():
    model, ids = tiny_model(), letters(1, 10)
    free = model.generate(ids, max_new_tokens=20, **GREEDY)
    last = int(free[0, 14])
    stopped = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=last)
    first = int((free[0, 10:] == last).nonzero()[0])
    assert torch.equal(stopped, free[:, : 10 + first + 1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("llama", marks=pytest.mark.compatibility("Static cache, torch.compile", "byte Llama")),
        pytest.param("gemma2", marks=pytest.mark.compatibility("Static cache, torch.compile", "byte Gemma 2")),
    ],
)
def test_compiled_decoding_on_a_static_cache(kind):
    model = fresh_model(kind)
    ids, mask = pad_left([letters(14), letters(9, seed=1)])
    settings = {"attention_mask": mask, "max_new_tokens": 12, **GREEDY}
    everywhere = CompileConfig(fullgraph=True, mode="default")
    everywhere._compile_all_devices = True  # `generate` compiles on accelerators alone, unless told
    compiled = model.generate(ids, cache_implementation="static", compile_config=everywhere, **settings)
    assert torch.equal(compiled, model.generate(ids, **settings))
    assert hasattr(model, "_compiled_call")
