"""Multibyte decoding of byte-level Llama and Gemma 2 on buffers of fixed size: the same bytes, from one graph."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, fresh_model, letters
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig

from byte_llama.static_tree_cache import PromptCache, StaticTreeCache, buffer_columns, static_tree_cache_bytes
from evabyte.byte_tree import DraftTrees
from evabyte.eva_cache import KeptPaths
from evabyte.static_decoding import model_state

EAGER = {"cache_implementation": "static", "disable_compile": True}
GRAPH = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}  # Dynamo, no kernels
DRAFTS = ["chain", "dynamic", "tree31", "lookup", "dynamic+lookup"]


def with_heads(kind, heads=4, **overrides):
    return fresh_model(kind, num_pred_heads=heads, **overrides)


def padded(lengths, seed=0):
    """Random rows padded on the left, and their mask."""
    ids, mask = torch.full((len(lengths), max(lengths)), 6), torch.zeros(len(lengths), max(lengths)).long()
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = letters(length, seed=seed + row), 1
    return ids, mask


def greedy(count, **more):
    return {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, **more}


@settings(max_examples=16)
@given(
    kind=st.sampled_from(KINDS),
    draft=st.sampled_from(DRAFTS),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    count=st.integers(1, 40),
    eos=st.sampled_from([None, 0, [1, 3]]),
    expands=st.booleans(),
    seed=st.integers(0, 99),
)
def test_greedy_equals_generate(kind, draft, lengths, count, eos, expands, seed):
    """Windows of 12 in the sliding layers, shorter and longer prompts, rows that end at different steps."""
    model = with_heads(kind, expand_input_ids=expands)
    ids, mask = padded(lengths, seed)
    how = greedy(count, attention_mask=mask) | {"eos_token_id": eos}
    assert torch.equal(model.multi_byte_generate(ids, draft=draft, **EAGER, **how), model.generate(ids, **how))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft", ["dynamic", "dynamic+lookup"])
def test_one_seed_one_text(kind, draft):
    model, ids = with_heads(kind), letters(1, 9)
    how = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.8, "top_k": 5, "eos_token_id": None}
    torch.manual_seed(1)
    expected = model.generate(ids, **how)
    torch.manual_seed(1)
    assert torch.equal(model.multi_byte_generate(ids, draft=draft, **EAGER, **how), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_without_heads(kind):
    model = fresh_model(kind, vocab_size=40)
    ids, mask = padded([12, 5])
    how = greedy(30, attention_mask=mask)
    expected = model.generate(ids, **how)
    for draft in (None, "subword", "subword+lookup"):
        assert torch.equal(model.multi_byte_generate(ids, draft=draft, **EAGER, **how), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_processors_scores_and_several_sequences(kind):
    model = with_heads(kind)
    ids, mask = padded([12, 5])
    how = greedy(25, attention_mask=mask, repetition_penalty=1.3) | {"eos_token_id": 2}
    how |= {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    plain, static = model.multi_byte_generate(ids, **how), model.multi_byte_generate(ids, **EAGER, **how)
    assert torch.equal(static.sequences, plain.sequences)
    for name in ("logits", "scores"):
        for mine, its in zip(static[name], plain[name], strict=True):
            torch.testing.assert_close(mine, its)
    several = {"num_return_sequences": 3, "do_sample": True, "top_k": 1, "max_new_tokens": 20, "attention_mask": mask}
    expected = model.generate(ids, **several)
    assert torch.equal(model.multi_byte_generate(ids, **EAGER, **several), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [3, 20])
@pytest.mark.parametrize("expands", [True, False])
def test_the_cache_goes_on(kind, length, expands):
    """A dynamic cache is returned, which a prompt longer or shorter than a sliding window began."""
    model, ids = with_heads(kind, expand_input_ids=expands), letters(1, length)
    first = model.multi_byte_generate(ids, return_dict_in_generate=True, **EAGER, **greedy(17))
    longer = torch.cat((first.sequences, ids[:, :2]), dim=1)
    how = greedy(12, attention_mask=torch.ones_like(longer))
    expected = model.generate(longer, **how)
    cache = first.past_key_values
    assert type(cache) is DynamicCache and cache.get_seq_length() == first.sequences.shape[1] - 1
    for method in (model.generate, model.multi_byte_generate):
        assert torch.equal(method(longer, past_key_values=deepcopy(cache), **how), expected)


def test_rows_of_unequal_length_leave_no_cache():
    model = with_heads("llama")
    ids, mask = padded([12, 5])
    how = greedy(25, attention_mask=mask, return_dict_in_generate=True)
    ends = model.generate(ids, **greedy(25, attention_mask=mask))[0, 20].item()
    output = model.multi_byte_generate(ids, **EAGER, **(how | {"eos_token_id": ends}))
    lengths = (output.sequences[:, 12:] == ends).int().argmax(-1)
    assert output.past_key_values is None and lengths[0] != lengths[1]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_pieces_and_as_embeddings(kind):
    model, ids = with_heads(kind), letters(2, 19)
    expected = model.generate(ids, **greedy(20))
    assert torch.equal(model.multi_byte_generate(ids, prefill_chunk_size=7, **EAGER, **greedy(20)), expected)
    embeddings = model.get_input_embeddings()(ids)
    expected = model.generate(inputs_embeds=embeddings, **greedy(20))
    assert torch.equal(model.multi_byte_generate(inputs_embeds=embeddings, **EAGER, **greedy(20)), expected)
    model = with_heads(kind, expand_input_ids=False)  # where embeddings say all that ids do
    embeddings = model.get_input_embeddings()(ids)
    written = model.multi_byte_generate(inputs_embeds=embeddings, **EAGER, **greedy(20))
    assert torch.equal(written, model.generate(ids, **greedy(20))[:, ids.shape[1] :])


@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_config_asks_for_both(kind):
    model, ids = with_heads(kind), letters(1, 9)
    expected = model.generate(ids, **greedy(20))
    model.generation_config.multibyte = True
    model.generation_config.cache_implementation = "static"
    model.generation_config.disable_compile = True
    assert torch.equal(model.generate(ids, **greedy(20)), expected)
    _, lengths = model.generate(ids, return_acc_lengths=True, multibyte=True, **greedy(20))
    assert lengths.sum() == 20


def filled(model, ids, max_cache_len, tree_nodes):
    prompts = PromptCache(model.config, max_cache_len, tree_nodes)
    model(ids, past_key_values=prompts)
    return StaticTreeCache(prompts, [0] * len(ids))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_buffers_stay_where_they_are(kind):
    model, ids = with_heads(kind), letters(1, 9)
    cache = filled(model, ids, 40, 5)
    states = [each for layer in cache.decoder_layers for each in (layer.keys, layer.values)]
    states += [cache.rows.past, cache.histories[0].symbols]
    before = [each.data_ptr() for each in states]
    chain = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    for _ in range(3):
        past = torch.tensor(cache.rows.lengths)
        model._verify_static(cache, past, letters(1, 5), torch.arange(-1, 4)[None], chain)
        cache.count(KeptPaths([[0, 1, 2]]))
    after = [each for layer in cache.decoder_layers for each in (layer.keys, layer.values)]
    assert before == [each.data_ptr() for each in (*after, cache.rows.past, cache.histories[0].symbols)]
    assert cache.get_seq_length() == 18
    owned = sum(each.nbytes for each in (*after, cache.histories[0].symbols))
    assert owned == static_tree_cache_bytes(model.config, 1, 40, 5, torch.float32)


@settings(max_examples=50)
@given(tokens=st.integers(1, 10**6), nodes=st.integers(1, 200))
def test_columns_are_few_sizes(tokens, nodes):
    needed, columns = tokens + nodes, buffer_columns(tokens, nodes)
    assert needed <= columns < needed + max(64, needed / 8 + 1) and columns % 8 == 0


@torch.no_grad()
def test_too_much_is_refused_before_it_is_written():
    model, ids = with_heads("llama"), letters(1, 9)
    with pytest.raises(ValueError, match="room for 8 tokens a row, padding included, and 9 are needed"):
        filled(model, ids, 8, 4)
    cache = filled(model, ids, 10, 4)
    with pytest.raises(ValueError, match="10 tokens a row, padding included, and 11"):
        cache.count(KeptPaths([[0, 1]]))
    assert cache.rows.lengths == [9]

    class Deep:
        """Has no `bounds`."""

        def draft(self, context):
            return DraftTrees(torch.zeros(1, 200).long(), torch.arange(-1, 199)[None], 199)

    with pytest.raises(ValueError, match="trees of 128 nodes, and this one has 200: give the drafter `bounds`"):
        model.multi_byte_generate(ids, draft=Deep(), **EAGER, **greedy(9))


def test_what_cannot_be_is_named():
    model, ids = with_heads("llama", num_hidden_layers=3), letters(1, 9)
    with pytest.raises(ValueError, match="no room for draft trees"):
        model.multi_byte_generate(ids, past_key_values=StaticCache(model.config, max_cache_len=60), **greedy(9))
    with pytest.raises(ValueError, match="stays on its device"):
        model.multi_byte_generate(ids, cache_implementation="offloaded_static", **greedy(9))
    model.skip_layers([1])
    for draft in ("self", "self+lookup"):
        with pytest.raises(ValueError, match="growing cache"):
            model.multi_byte_generate(ids, draft=draft, **EAGER, **greedy(9))
    model = with_heads("llama", eva_layers="all", eva_window_size=8, eva_chunk_size=2)
    with pytest.raises(ValueError, match="`eva_layers` have no static cache"):
        model.multi_byte_generate(ids, **EAGER, **greedy(9))


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


FEATURE = "multi_byte_generate on a static cache, one compiled step"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("llama", marks=pytest.mark.compatibility(FEATURE, "byte Llama")),
        pytest.param("gemma2", marks=pytest.mark.compatibility(FEATURE, "byte Gemma 2")),
    ],
)
def test_one_graph_serves_all_steps(kind):
    """Prompts and calls of other lengths, rows that end, processors, sampling: no step is compiled again."""
    model = with_heads(kind)
    assert model_state(model) is not None  # nothing of the model is checked before every step
    ids, mask = padded([14, 20])
    how, before = greedy(30, attention_mask=mask), graphs()
    assert torch.equal(model.multi_byte_generate(ids, **GRAPH, **how), model.generate(ids, **how))
    assert graphs() == before + 1
    others, mask = padded([3, 9], seed=4)
    for how in (
        greedy(35, attention_mask=mask, eos_token_id=0),
        greedy(9, attention_mask=mask, repetition_penalty=1.2),
    ):
        assert torch.equal(model.multi_byte_generate(others, **GRAPH, **how), model.generate(others, **how))
    model.multi_byte_generate(others, attention_mask=mask, max_new_tokens=20, do_sample=True, temperature=1.7, **GRAPH)
    assert graphs() == before + 1


def test_rotary_embeddings_that_look_at_positions_are_not_compiled():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model, ids, before = with_heads("llama", rope_parameters=rope), letters(2, 11), graphs()
    static = model.multi_byte_generate(ids, **GRAPH, **greedy(20))
    assert torch.equal(static, model.generate(ids, **greedy(20))) and graphs() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft", ["chain", "dynamic", "lookup", "dynamic+lookup"])
def test_compiled_by_inductor(kind, draft):
    model = with_heads(kind)
    ids, mask = padded([14, 20, 5])
    for how in (greedy(40, attention_mask=mask), greedy(20, attention_mask=mask, repetition_penalty=1.2)):
        static = model.multi_byte_generate(ids, draft=draft, cache_implementation="static", **how)
        assert torch.equal(static, model.generate(ids, **how))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft", ["chain", "dynamic", "lookup"])
def test_cuda_graphs_write_the_same_bytes(kind, draft):
    model = with_heads(kind).cuda()
    ids, mask = (each.cuda() for each in padded([14, 20, 5]))
    for count in (40, 100):  # the second in larger buffers, elsewhere
        how = greedy(count, attention_mask=mask)
        static = model.multi_byte_generate(ids, draft=draft, cache_implementation="static", **how)
        assert torch.equal(static, model.generate(ids, **how))
