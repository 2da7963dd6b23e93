"""Continuous batching: every request gets what `generate` gives it alone, whatever shares its batches."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import fresh_model, letters, logits_alone
from transformers import AttentionInterface, AutoModel, ContinuousBatchingConfig, GenerationConfig
from transformers.models.llama.modeling_llama import eager_attention_forward

from byte_llama import request_history
from byte_llama.request_history import last_symbols, request_windows

FEATURE = "Continuous batching (generate_batch)"
PAGE = 32
MODELS = {
    "llama": {},
    "gemma2": {"attn_logit_softcapping": None},
    "llama without expansion": {"expand_input_ids": False, "expand_input_ids_dict": None},
}


@cache
def model_named(name):
    """Do not change it: tests share it."""
    return fresh_model(name.split()[0], attn_implementation="eager", **MODELS[name])


def sizes(**others):
    page = {"page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size": PAGE}
    return ContinuousBatchingConfig(max_batch_tokens=48, return_logprobs=True, **{"num_blocks": 60, **page, **others})


def greedy(count=10, **others):
    return GenerationConfig(do_sample=False, max_new_tokens=count, eos_token_id=-1, **others)


def assert_as_alone(model, output, count):
    """The request's bytes are the most probable ones, with the probabilities of a forward over the text at once."""
    assert output.error is None and len(output.generated_tokens) == count
    text = torch.tensor(list(output.prompt_ids) + list(output.generated_tokens))
    expected = logits_alone(model, text)[len(output.prompt_ids) - 1 : -1].log_softmax(-1)
    assert output.generated_tokens == expected.argmax(-1).tolist()
    torch.testing.assert_close(torch.tensor(output.logprobs), expected.amax(-1), rtol=1e-4, atol=1e-4)


@pytest.fixture
def scheduled(monkeypatch):
    """What the scheduler ran: name of the request, number of ids before the new ones, length of its prompt."""
    runs = []

    def look(request, width):
        state = request.state
        runs.append((state.request_id, state.position_offset - request.query_length, len(state.initial_tokens)))
        return last_symbols(request, width)

    monkeypatch.setattr(request_history, "last_symbols", look)
    return runs


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("llama", marks=pytest.mark.compatibility(FEATURE, "byte Llama")),
        pytest.param("gemma2", marks=pytest.mark.compatibility(FEATURE, "byte Gemma 2")),
        "llama without expansion",
    ],
)
def test_each_request_gets_what_generate_gives_it_alone(name):
    # Prompts longer than a batch are cut, short ones join running batches, and there are more than fit one batch.
    model = model_named(name)
    prompts = [letters(n, seed=n).tolist() for n in (3, 60, 17, 1, 90, 25, 2, 7)]
    outputs = model.generate_batch(prompts, generation_config=greedy(), continuous_batching_config=sizes())
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert output.prompt_ids == prompt
        assert_as_alone(model, output, 10)
        alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=None)
        assert output.generated_tokens == alone[0, len(prompt) :].tolist()
    assert model.config._attn_implementation == "eager"


def test_a_shared_prefix_and_the_bytes_behind_it(scheduled):
    # Behind the shared pages the computation starts in mid-word.
    model, start = model_named("llama"), letters(2 * PAGE + 3, seed=9).tolist()
    prompts = [start, *(start[: 2 * PAGE] + letters(n, seed=n).tolist() for n in (1, 4, 9, 15))]
    how = {"generation_config": greedy(), "continuous_batching_config": sizes()}
    with model.continuous_batching_context_manager(**how) as manager:
        outputs = []
        for prompt in prompts:  # one after the other: only what is complete can be shared
            outputs.append(manager.get_result(manager.add_request(prompt, eos_token_id=-1), timeout=60))
    first = {}
    for request, past, _ in scheduled:
        first.setdefault(request, past)
    assert list(first.values()) == [0] + [2 * PAGE] * 4
    for output in outputs:
        assert_as_alone(model, output, 10)


def test_forked_requests():
    model, prompts = model_named("llama"), [letters(50).tolist(), letters(7).tolist()]
    best_of_one = GenerationConfig(do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=10, eos_token_id=-1)
    how = {"generation_config": best_of_one, "continuous_batching_config": sizes()}
    with model.continuous_batching_context_manager(**how) as manager:
        manager.add_requests(prompts)
        outputs = [manager.get_result(timeout=60) for _ in range(6)]
    assert sorted(len(output.prompt_ids) for output in outputs) == [7] * 3 + [50] * 3
    for output in outputs:
        alone = model.generate(torch.tensor([output.prompt_ids]), do_sample=False, max_new_tokens=10, eos_token_id=None)
        assert output.generated_tokens == alone[0, len(output.prompt_ids) :].tolist()


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])])
def test_requests_that_outgrow_the_cache_start_again(name, scheduled):
    model = model_named(name)
    prompts = [letters(PAGE - 2, seed=n).tolist() for n in range(5)]
    outputs = model.generate_batch(
        prompts, generation_config=greedy(40), continuous_batching_config=sizes(num_blocks=7)
    )
    assert name.endswith("without expansion") or any(prompt > PAGE for _, _, prompt in scheduled)
    for output in outputs.values():
        assert_as_alone(model, output, 40)


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_sampling_takes_its_arguments_beside_the_histories(name):
    model = model_named(name)
    prompts = [letters(n, seed=n).tolist() for n in (5, 30)]
    sampled = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, max_new_tokens=8, eos_token_id=-1)
    how = {"generation_config": sampled, "continuous_batching_config": sizes(per_request_processors=True)}
    with model.continuous_batching_context_manager(**how) as manager:
        ids = [manager.add_request(prompt, top_k=1, temperature=0.5, eos_token_id=-1) for prompt in prompts]
        outputs = [manager.get_result(request, timeout=60) for request in ids]
    for prompt, output in zip(prompts, outputs, strict=True):
        alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=None)
        assert output.generated_tokens == alone[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_a_manager_that_is_kept():
    model = fresh_model("llama", attn_implementation="eager")
    for n in (9, 20):
        arguments = {"generation_config": greedy(), "continuous_batching_config": sizes(), "persistent_manager": True}
        (output,) = model.generate_batch([letters(n, seed=n).tolist()], **arguments).values()
        assert_as_alone(model, output, 10)
    model.destroy_cached_continuous_batching_manager()


@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 7)), min_size=1, max_size=4),
    padding=st.integers(0, 5),
    width=st.integers(1, 5),
)
def test_windows_of_requests(lengths, padding, width):
    news, windows, histories = [], [], []
    for row, (new, past) in enumerate(lengths):
        whole = [100 * row + each for each in range(1, past + new + 1)]
        known = ([0] * width + whole[:past])[-width:]
        news += whole[past:]
        histories.append(known)
        windows += [([0] * new + known + whole[past:])[new + at : new + at + width + 1][::-1] for at in range(new)]
    borders = [0]
    for new, _ in lengths:
        borders.append(borders[-1] + new)
    fake = min(padding, 2)  # requests without symbols, as graphs of a fixed size have them
    borders += [borders[-1]] * fake
    found = request_windows(
        torch.tensor([news + [0] * padding]),
        torch.tensor(borders, dtype=torch.int32),
        torch.tensor(histories + [[0] * width] * fake, dtype=torch.int32).T,
    )
    assert found.shape == (1, len(news) + padding, width + 1)
    assert found[0, : len(news)].tolist() == windows


@given(prompt=st.integers(0, 8), generated=st.integers(0, 8), new=st.integers(1, 4), width=st.integers(1, 6))
def test_last_symbols(prompt, generated, new, width):
    ids = list(range(100, 100 + prompt + generated))
    state = SimpleNamespace(initial_tokens=ids[:prompt], generated_tokens=ids[prompt:], request_id="r")
    for past in range(len(ids) + 1):
        state.position_offset = past + new
        expected = ([0] * width + [each + 1 for each in ids[:past]])[-width:]
        assert last_symbols(SimpleNamespace(state=state, query_length=new), width) == expected
    state.position_offset = len(ids) + 1 + new
    with pytest.raises(RuntimeError, match="'r' has computed"):
        last_symbols(SimpleNamespace(state=state, query_length=new), width)


@pytest.mark.compatibility(
    "Continuous batching of a model with soft caps, without flash attention",
    "byte Gemma 2",
    refused="Continuous batching (`generate_batch`) with attn_implementation='paged|eager' would leave out",
)
def test_soft_caps_are_not_left_out():
    model = fresh_model("gemma2")
    given = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"would leave out the attention's soft caps .*flash_attention_2.*`generate`"):
        model.generate_batch([[1, 2, 3]], generation_config=greedy())
    assert model.config._attn_implementation == given


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_servers_with_caches_of_their_own_are_refused(server, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, server, eager_attention_forward)
    config = fresh_model("llama").config
    with pytest.raises(NotImplementedError, match=r"does not tell a model the bytes before .* `generate_batch`"):
        AutoModel.from_config(config, attn_implementation=server)
    config = fresh_model("llama", expand_input_ids=False).config
    assert AutoModel.from_config(config, attn_implementation=server).config._attn_implementation == server
