"""Trees on rows of unequal length against each node's text alone, with transformers' own models."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from byte_llama.tree_cache import TreeCache
from evabyte.eva_cache import KeptPaths
from evabyte.eva_layout import DraftTree

SIZES = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
)  # fmt: skip


@cache
def model_of(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=7, query_pre_attn_scalar=8)).eval()


def random_trees(rows, nodes, generator):
    """Parents [B, T] before children, and the ancestors' mask."""
    parents = torch.full((rows, nodes), -1)
    mask = torch.eye(nodes, dtype=torch.bool).repeat(rows, 1, 1)
    for row in range(rows):
        for node in range(1, nodes):
            parents[row, node] = torch.randint(max(0, node - 3), node, (), generator=generator)
            mask[row, node] |= mask[row, parents[row, node]]
    return parents, mask


def prefilled(model, texts):
    """A tree cache that holds the texts, padded on the left."""
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return TreeCache(cache, [longest - len(text) for text in texts])


def verify(model, cache, ids, tree):
    masks = cache.masks(tree, torch.float32, ids.device)
    mask = masks if len(masks) > 1 else masks["full_attention"]
    positions = cache.rows.positions(tree, ids.device)
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@settings(max_examples=12)
@given(
    kind=st.sampled_from(["llama", "gemma2"]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_every_node_is_its_text_alone(kind, lengths, rounds, seed):
    model, generator = model_of(kind), torch.Generator().manual_seed(seed)
    texts = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths]
    cache = prefilled(model, texts)
    for _ in range(rounds):
        nodes = int(torch.randint(1, 9, (), generator=generator))
        ids = torch.randint(1, 50, (len(texts), nodes), generator=generator)
        _, mask = random_trees(len(texts), nodes, generator)
        logits = verify(model, cache, ids, DraftTree.from_mask(mask))
        paths = []
        for row, text in enumerate(texts):
            for node in range(nodes):
                path = mask[row, node].nonzero().flatten()
                alone = model(torch.tensor([text + ids[row, path].tolist()])).logits[0, -1]
                torch.testing.assert_close(logits[row, node], alone, atol=2e-5, rtol=1e-4)
            kept = mask[row, int(torch.randint(0, nodes, (), generator=generator))].nonzero().flatten().tolist()
            paths.append(kept)
            text += ids[row, kept].tolist()
        cache.commit(KeptPaths(paths))


@settings(max_examples=15)
@given(
    kind=st.sampled_from(["llama", "gemma2"]),
    batches=st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=2), min_size=2, max_size=3),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_rows_of_other_caches_join(kind, batches, rounds, seed):
    model, generator = model_of(kind), torch.Generator().manual_seed(seed)
    texts = [[torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths] for lengths in batches]
    cache, *others = [prefilled(model, each) for each in texts]
    texts = [text for each in texts for text in each]
    cache.append_rows(others)
    assert cache.restore() is None
    for _ in range(rounds):
        ids = torch.randint(1, 50, (len(texts), 4), generator=generator)
        _, mask = random_trees(len(texts), 4, generator)
        logits = verify(model, cache, ids, DraftTree.from_mask(mask))
        paths = []
        for row, text in enumerate(texts):
            path = mask[row, 3].nonzero().flatten().tolist()
            alone = model(torch.tensor([text + ids[row, path].tolist()])).logits[0, -1]
            torch.testing.assert_close(logits[row, 3], alone, atol=2e-5, rtol=1e-4)
            paths.append(path[: int(torch.randint(0, len(path) + 1, (), generator=generator))])
            text += ids[row, paths[-1]].tolist()
        if any(paths):
            cache.commit(KeptPaths(paths))


@torch.no_grad()
def test_columns_that_nobody_looks_at_go_as_rows_join():
    model = model_of("gemma2")  # its first layer looks 7 positions back, its second everywhere
    cache = prefilled(model, [[3] * 100])
    cache.append_rows([prefilled(model, [[4] * 90]), prefilled(model, [[5] * 95])])
    assert [layer.keys.shape[2] for layer in cache.decoder_layers[:2]] == [100 - (90 - 6), 100]
    cache.batch_select_indices(torch.tensor([1]))
    cache.append_rows([prefilled(model, [[6] * 8])])
    assert [layer.keys.shape[2] for layer in cache.decoder_layers[:2]] == [100 - (8 - 6), 100]
    cache.batch_select_indices(torch.tensor([1]))
    cache.append_rows([prefilled(model, [[7] * 8])])
    assert [layer.keys.shape[2] for layer in cache.decoder_layers[:2]] == [16 - (8 - 6), 16]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@torch.no_grad()
def test_pending_chains_and_rows_that_leave(kind):
    """A draft written node by node is seen by its next nodes, and is gone when forgotten."""
    model = model_of(kind)
    texts = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]]
    cache = prefilled(model, texts)
    cache.batch_select_indices(torch.tensor([0, 2]))
    del texts[1]
    single = DraftTree.from_mask(torch.ones(1, 1, 1, dtype=torch.bool))
    for draft in ([20, 21], [22, 23], [24, 25]):
        logits = verify(model, cache, torch.tensor(draft)[:, None], single)[:, 0]
        cache.keep_pending(1)
        for row, text in enumerate(texts):
            text.append(draft[row])
            torch.testing.assert_close(logits[row], model(torch.tensor([text])).logits[0, -1], atol=2e-5, rtol=1e-4)
    cache.forget_pending()
    logits = verify(model, cache, torch.tensor([[30], [31]]), single)[:, 0]
    for row, text in enumerate(texts):
        alone = model(torch.tensor([[*text[:-3], 30 + row]])).logits[0, -1]
        torch.testing.assert_close(logits[row], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@torch.no_grad()
def test_restored_cache_goes_on(kind):
    model, text = model_of(kind), [3, 4, 5, 6, 7, 8, 9, 10]
    cache = prefilled(model, [text])
    chain = DraftTree.from_mask(torch.ones(1, 5, 5, dtype=torch.bool).tril())
    verify(model, cache, torch.tensor([[20, 21, 22, 23, 24]]), chain)
    cache.commit(KeptPaths([[0, 1, 2]]))
    restored = cache.restore()
    assert isinstance(restored, DynamicCache) and restored.get_seq_length() == 11
    logits = model(torch.tensor([[30, 31]]), past_key_values=restored).logits
    expected = model(torch.tensor([[*text, 20, 21, 22, 30, 31]])).logits[:, -2:]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)

    uneven = prefilled(model, [text, text])
    verify(model, uneven, torch.tensor([[20], [21]]), DraftTree.from_mask(torch.ones(1, 1, 1, dtype=torch.bool)))
    uneven.commit(KeptPaths([[0], []]))
    assert uneven.restore() is None


def test_other_caches_are_refused():
    model = model_of("llama")
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.tensor([[3, 4]]), past_key_values=cache)
    with pytest.raises(ValueError, match="StaticLayer"):
        TreeCache(cache, [0])
