"""Byte ids in the cache: any way of decoding gives what one full forward gives."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, LETTERS, PAD, VOCABULARY, letters, logits_alone, tiny_model
from transformers import DynamicCache, StaticCache

from byte_llama.byte_history import ByteHistory, StaticByteHistory, byte_history
from byte_llama.subword_expansion import parents_of

TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}
LENGTH = 64
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "created as written": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(model.config, max_cache_len=LENGTH),
}
caches = st.sampled_from(list(CACHES))
# Gemma's windows count slots, padding among them, and masks made by hand below have none: one that nothing reaches.
WIDE = {"llama": {}, "gemma2": {"sliding_window": 256}}
kinds = st.sampled_from(KINDS)


def in_pieces(model, cache, ids, cuts, **columns):
    """Logits [B, N, vocabulary] of ids [B, N] given in pieces; `columns` [B, N] are cut with them."""
    pieces, start = [], 0
    for length in [*cuts, ids.shape[1]]:
        stop = min(start + length, ids.shape[1])
        if start < stop:
            own = {name: tensor[:, start:stop] for name, tensor in columns.items() if name != "attention_mask"}
            if "attention_mask" in columns:
                own["attention_mask"] = columns["attention_mask"][:, :stop]
            pieces.append(step(model, cache, ids[:, start:stop], **own))
        start = stop
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def step(model, cache, ids, **kwargs):
    return model(ids, past_key_values=cache, **kwargs).logits


@given(kind=kinds, cache=caches, length=st.integers(1, LENGTH), cuts=st.lists(st.integers(1, 30), max_size=8))
def test_any_split_equals_one_forward(kind, cache, length, cuts):
    model, ids = tiny_model(kind), letters(2, length)
    logits = in_pieces(model, CACHES[cache](model), ids, cuts)
    for row in range(2):
        torch.testing.assert_close(logits[row], logits_alone(model, ids[row]), **TOLERANCE)


@given(
    kind=kinds,
    cache=caches,
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=3),
    gaps=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    after=st.integers(0, 20),
    cuts=st.lists(st.integers(1, 20), max_size=6),
    seed=st.integers(0, 9),
)
def test_padding_anywhere_in_any_split(kind, cache, lengths, gaps, after, cuts, seed):
    """Padding in front of rows, behind them and within: each row gives what its own ids alone give."""
    model = tiny_model(kind, **WIDE[kind])
    total = max(lengths) + 6 + after
    ids = torch.full((len(lengths), total), PAD)
    mask, positions = torch.zeros(2, len(lengths), total, dtype=torch.int64)
    rows = [letters(n, seed=seed + row) for row, n in enumerate(lengths)]
    for row, (tokens, gap) in enumerate(zip(rows, gaps, strict=False)):
        first = len(tokens) // 2
        place = torch.cat(
            (torch.arange(first), torch.arange(first, len(tokens)) + min(gap, total - len(tokens)))
        ) + min(3, total - len(tokens) - gap)
        ids[row, place], mask[row, place], positions[row, place] = tokens, 1, torch.arange(len(tokens))
    logits = in_pieces(model, CACHES[cache](model), ids, cuts, attention_mask=mask, position_ids=positions)
    for row, tokens in enumerate(rows):
        torch.testing.assert_close(logits[row, mask[row] == 1], logits_alone(model, tokens), **TOLERANCE)


@given(
    kind=kinds,
    documents=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    backend=st.sampled_from(["eager", "sdpa"]),
)
def test_packed_documents(kind, documents, backend):
    model = tiny_model(kind)
    if kind == "llama":
        model.set_attn_implementation(backend)
    ids = letters(1, sum(documents))
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    with torch.no_grad():
        logits = model(ids, position_ids=positions, use_cache=False).logits[0]
    model.set_attn_implementation("eager")
    for document, expected in zip(logits.split(documents), ids[0].split(documents), strict=True):
        torch.testing.assert_close(document, logits_alone(model, expected), **TOLERANCE)


@given(
    kind=kinds,
    prompt=st.integers(1, 8),
    moves=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=6),
    pads=st.integers(0, 5),
)
def test_crop_leaves_no_trace(kind, prompt, moves, pads):
    model = tiny_model(kind, **WIDE[kind])
    rows = [letters(prompt), letters(max(prompt - pads, 1), seed=1)]
    missing = prompt - len(rows[1])
    ids = torch.stack((rows[0], torch.cat((torch.full((missing,), PAD), rows[1]))))
    mask = torch.ones_like(ids)
    mask[1, :missing] = 0
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    step(model, cache, ids, attention_mask=mask, position_ids=positions)

    def go_on(new):
        nonlocal mask
        mask = torch.cat((mask, torch.ones_like(new)), dim=1)
        positions = mask.cumsum(-1)[:, -new.shape[1] :] - 1
        return step(model, cache, new, attention_mask=mask, position_ids=positions)

    for number, (written, removed) in enumerate(moves):
        new, removed = letters(2, written, seed=number + 2), min(removed, written)
        go_on(new)
        cache.crop(-removed)
        mask = mask[:, : mask.shape[1] - removed]
        rows = [torch.cat((row, new[b, : written - removed])) for b, row in enumerate(rows)]
    probe = letters(2, 3, seed=99)
    logits = go_on(probe)
    for b, row in enumerate(rows):
        expected = logits_alone(model, torch.cat((row, probe[b])))[-3:]
        torch.testing.assert_close(logits[b], expected, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_can_be_chosen_repeated_and_reordered(kind):
    model, ids = tiny_model(kind), letters(3, 20)
    cache = DynamicCache(config=model.config)
    step(model, cache, ids)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
    rows = [ids[row] for row in (0, 2, 0, 2)]
    new = letters(4, 6, seed=7)
    logits = step(model, copy.deepcopy(cache), new)
    for b, row in enumerate(rows):
        torch.testing.assert_close(logits[b], logits_alone(model, torch.cat((row, new[b])))[-6:], **TOLERANCE)


@pytest.mark.parametrize("cache", CACHES)
def test_reorder_and_reset(cache):
    model, ids = tiny_model(), letters(2, 20)
    cache = CACHES[cache](model)
    step(model, cache, ids)
    cache.reorder_cache(torch.tensor([1, 0]))
    new = letters(2, 4, seed=2)
    expected = logits_alone(model, torch.cat((ids[1], new[0])))[-4:]
    torch.testing.assert_close(step(model, cache, new)[0], expected, **TOLERANCE)
    history = byte_history(cache)
    history.reset()
    assert history.tail() is None or not history.tail().any()
    if cache.is_compileable:  # growing caches of transformers 5.17 keep their length
        cache.reset()
        torch.testing.assert_close(step(model, cache, ids)[1], logits_alone(model, ids[1]), **TOLERANCE)


def test_one_layer_behind_the_decoders():
    model = tiny_model()
    for make, kind in ((CACHES["dynamic"], ByteHistory), (CACHES["static"], StaticByteHistory)):
        cache = make(model)
        before = (cache.is_compileable, cache.get_max_length())
        step(model, cache, letters(2, 9))
        step(model, cache, letters(2, 1))
        assert len(cache.layers) == model.config.num_hidden_layers + 1 and type(cache.layers[-1]) is kind
        assert byte_history(cache) is cache.layers[-1]
        assert (cache.is_compileable, cache.get_max_length()) == before
        assert cache.get_seq_length() == 10
    assert byte_history(None) is byte_history(DynamicCache()) is None
    plain = DynamicCache(config=model.config)
    step(tiny_model(expand_input_ids=False), plain, letters(1, 4))
    assert byte_history(plain) is None


class Fetched:
    """A layer that says when it is fetched back."""

    def __init__(self, is_sliding):
        self.is_sliding, self.fetched = is_sliding, False

    def prefetch(self):
        self.fetched = True


@pytest.mark.parametrize("history", [ByteHistory, StaticByteHistory])
def test_after_the_history_the_first_layers_are_fetched(history):
    layers = [Fetched(True), Fetched(False), Fetched(False)]
    layers.append(history(layers, 16))
    layers[-1].prefetch()
    assert [layer.fetched for layer in layers[:3]] == [True, True, False]


@torch.no_grad()
def test_embeddings_in_place_of_ids():
    """Nothing is added to them, and matches stop short of them."""
    model, ids = tiny_model(), letters(1, 12)
    decoder = model.model
    embeddings = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    step(model, cache, None, inputs_embeds=embeddings)
    logits = step(model, cache, ids)

    expansion = decoder.subword_expansion
    subwords = expansion(expansion.as_symbols(ids))
    own = decoder.embed_tokens(ids) + decoder.expand_embed_tokens(subwords)
    plain = tiny_model(expand_input_ids=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = plain(inputs_embeds=torch.cat((embeddings, own), dim=1)).logits[:, 5:]
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@torch.no_grad()
def test_a_cache_filled_without_ids():
    """Keys and values from elsewhere (prefix tuning): the ids before are unknown, those after are not."""
    model, ids = tiny_model(), letters(1, 20)
    plain, cache = tiny_model(expand_input_ids=False), DynamicCache(config=model.config)
    step(plain, cache, letters(1, 4, seed=1))
    whole, pieces = copy.deepcopy(cache), copy.deepcopy(cache)
    torch.testing.assert_close(in_pieces(model, pieces, ids, [1, 6, 1, 1]), step(model, whole, ids), **TOLERANCE)


@settings(max_examples=20)
@given(
    kind=kinds,
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=3),
    nodes=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_draft_trees(kind, lengths, nodes, seed):
    """Nodes see their own paths, and what is kept of them goes on as text."""
    model = tiny_model(kind, **WIDE[kind])
    longest = max(lengths)
    rows = [letters(n, seed=seed + row) for row, n in enumerate(lengths)]
    ids = torch.stack([torch.cat((torch.full((longest - len(row),), PAD), row)) for row in rows])
    mask = (ids != PAD).long()
    cache = DynamicCache(config=model.config)
    step(model, cache, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))

    generator = torch.Generator().manual_seed(seed)
    tree = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        tree[node] |= tree[max(0, node - 1 - int(torch.randint(3, (), generator=generator)))]
    draft = torch.randint(0, LETTERS, (len(rows), nodes), generator=generator)
    seen = torch.cat((mask.bool()[:, None].expand(-1, nodes, -1), tree.expand(len(rows), -1, -1)), dim=-1)[:, None]
    positions = mask.sum(-1, keepdim=True) + tree.sum(-1) - 1
    masks = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits = step(
        model,
        copy.deepcopy(cache),
        draft,
        parents=parents_of(tree[None]),
        position_ids=positions,
        attention_mask={"full_attention": masks, "sliding_attention": masks} if kind == "gemma2" else masks,
    )
    for b, row in enumerate(rows):
        for node in range(nodes):
            expected = logits_alone(model, torch.cat((row, draft[b, tree[node]])))[-1]
            torch.testing.assert_close(logits[b, node], expected, **TOLERANCE)


def test_new_ids_beyond_the_table_match_nothing():
    """After `resize_token_embeddings` there may be ids that no subword knows."""
    model = tiny_model()
    expansion = model.model.subword_expansion
    ids = torch.tensor([[0, VOCABULARY + 3, 0]])
    subwords = expansion(expansion.as_symbols(ids))
    assert subwords[0, 1] == 0 and subwords[0, 2] == subwords[0, 0]
