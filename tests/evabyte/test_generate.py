"""transformers' own `generate` in all its modes, against decoding that uses no cache at all."""

import pytest
import torch
from goldens_io import load_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import logits_alone, pad_left, random_ids, tiny_model
from transformers import DynamicCache


def greedy_by_hand(model, ids, count):
    """Greedy bytes of one sequence [N], a whole forward each."""
    for _ in range(count):
        ids = torch.cat((ids, logits_alone(model, ids)[-1, 0].argmax()[None]))
    return ids


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 35), min_size=1, max_size=3), count=st.integers(1, 20))
def test_greedy_batches_equal_each_row_alone(lengths, count):
    model = tiny_model()
    rows = [random_ids(n, seed=row) for row, n in enumerate(lengths)]
    ids, mask = pad_left(rows)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None)
    for row, tokens in enumerate(rows):
        assert torch.equal(output[row, ids.shape[1] - len(tokens) :], greedy_by_hand(model, tokens, count))


def test_without_a_cache():
    model, ids = tiny_model(), random_ids(2, 20)
    cached = model.generate(ids, max_new_tokens=25, do_sample=False, eos_token_id=None)
    assert torch.equal(
        cached, model.generate(ids, max_new_tokens=25, do_sample=False, eos_token_id=None, use_cache=False)
    )


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search(num_beams):
    model = tiny_model()
    ids, mask = pad_left([random_ids(14), random_ids(9, seed=1)])
    settings = {"max_new_tokens": 24, "num_beams": num_beams, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=mask, num_return_sequences=2, **settings)
    plain = model.generate(ids, attention_mask=mask, num_return_sequences=2, use_cache=False, **settings)
    assert torch.equal(cached, plain)


def test_assisted_decoding_equals_greedy():
    golden = load_golden("multibyte_w256_c8")
    model, prompt = golden.model(), golden["in.p240.prompt"]
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    greedy = model.generate(prompt, **settings)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=6, **settings), greedy)
    assistant = tiny_model(256, 8)
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **settings), greedy)
    assert torch.equal(model.generate(prompt, assistant_model=golden.model(), **settings), greedy)


@pytest.mark.parametrize("num_tokens", [3, 9])
def test_prompt_lookup_across_windows(num_tokens):
    model = tiny_model(8, 4)
    ids = random_ids(1, 6).repeat(1, 4)
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(ids, prompt_lookup_num_tokens=num_tokens, **settings), model.generate(ids, **settings)
    )


@pytest.mark.parametrize("prefill_chunk_size", [1, 5, 16, 40])
def test_prefill_in_chunks(prefill_chunk_size):
    model = tiny_model()
    ids, mask = pad_left([random_ids(37), random_ids(20, seed=1)])
    settings = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(ids, prefill_chunk_size=prefill_chunk_size, **settings), model.generate(ids, **settings)
    )


def test_sampling_and_several_sequences():
    model, ids = tiny_model(), random_ids(2, 10)
    settings = {"max_new_tokens": 30, "do_sample": True, "num_return_sequences": 3, "eos_token_id": None}
    torch.manual_seed(0)
    cached = model.generate(ids, **settings)
    torch.manual_seed(0)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert cached.shape == (6, 40)


def test_a_conversation_goes_on_with_its_cache():
    model, ids = tiny_model(), random_ids(1, 10)
    settings = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    cache = DynamicCache(config=model.config)
    for turn in range(3):
        output = model.generate(ids, past_key_values=cache, **settings)
        assert torch.equal(output.sequences, model.generate(ids, **settings).sequences)
        cache = output.past_key_values
        ids = torch.cat((output.sequences, random_ids(1, 7, seed=turn)), dim=1)


def test_prompt_as_embeddings():
    model, ids = tiny_model(), random_ids(2, 21)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **settings), model.generate(ids, **settings)[:, 21:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model = tiny_model(dtype=dtype)
    output = model.generate(random_ids(2, 20), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert output.shape == (2, 40)
    logits = model(output, use_cache=False).logits
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert (logits - tiny_model()(output, use_cache=False).logits).abs().mean() < 0.2
