"""The cache: any split of a text into calls gives what one forward gives, and going back leaves no trace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import logits_alone, pad_rows, random_ids, tiny_model
from transformers import DynamicCache

from evabyte.eva_cache import KeptPaths
from evabyte.eva_static_cache import EvaStaticCache

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
backends = st.sampled_from(["sdpa", "naive"])
windows = st.sampled_from([(16, 4), (6, 3), (1, 1), (4, 4)])


def new_cache(model):
    return DynamicCache(config=model.config)


@torch.no_grad()
def step(model, cache, ids, **kwargs):
    return model(ids, past_key_values=cache, return_all_pred_logits=True, **kwargs).logits


@given(length=st.integers(1, 60), cuts=st.lists(st.integers(1, 30), max_size=8), sizes=windows, backend=backends)
def test_any_split_equals_one_forward(length, cuts, sizes, backend):
    model, ids = tiny_model(*sizes, backend=backend), random_ids(2, length)
    cache, start, pieces = new_cache(model), 0, []
    for cut in [*cuts, length]:
        stop = min(start + cut, length)
        if start < stop:
            pieces.append(step(model, cache, ids[:, start:stop]))
        start = stop
    logits = torch.cat(pieces, dim=1)
    for row in range(2):
        torch.testing.assert_close(logits[row], logits_alone(model, ids[row]), **TOLERANCE)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    offsets=st.lists(st.integers(0, 20), min_size=4, max_size=4),
    cuts=st.lists(st.integers(1, 20), max_size=8),
    sizes=windows,
)
def test_padding_anywhere_in_any_split(lengths, offsets, cuts, sizes):
    model = tiny_model(*sizes)
    rows = [random_ids(n, seed=row) for row, n in enumerate(lengths)]
    total = max(n + offset for n, offset in zip(lengths, offsets, strict=False)) + 3
    ids, mask = pad_rows(rows, offsets[: len(rows)], total)
    cache, start, pieces = new_cache(model), 0, []
    for cut in [*cuts, total]:
        stop = min(start + cut, total)
        if start < stop:
            pieces.append(step(model, cache, ids[:, start:stop], attention_mask=mask[:, :stop]))
        start = stop
    logits = torch.cat(pieces, dim=1)
    assert logits.isfinite().all()
    assert cache.layers[0].lengths == tuple(lengths)
    for row, tokens in enumerate(rows):
        if len(tokens):
            place = slice(offsets[row], offsets[row] + len(tokens))
            torch.testing.assert_close(logits[row, place], logits_alone(model, tokens), **TOLERANCE)


@given(documents=st.lists(st.integers(1, 30), min_size=2, max_size=4), cut=st.integers(1, 40), sizes=windows)
def test_packed_documents_on_a_cache(documents, cut, sizes):
    """Position 0 starts a document on a cache too, which then holds that document alone."""
    model, total = tiny_model(*sizes), sum(documents)
    ids = random_ids(1, total)
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    cache, cut = new_cache(model), min(cut, total - 1)
    logits = torch.cat(
        [
            step(model, cache, ids[:, :cut], position_ids=positions[:, :cut]),
            step(model, cache, ids[:, cut:], position_ids=positions[:, cut:]),
        ],
        dim=1,
    )
    start = 0
    for n in documents:
        if n > 1 or start + n != total:  # one token alone may not say that it starts a document
            expected = logits_alone(model, ids[0, start : start + n])
            torch.testing.assert_close(logits[0, start : start + n], expected, **TOLERANCE)
        start += n


@given(
    prompt=st.integers(1, 40),
    moves=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=5),
    sizes=st.sampled_from([(16, 4), (12, 3)]),
    pads=st.integers(0, 5),
)
def test_crop_leaves_no_trace(prompt, moves, sizes, pads):
    """Write some tokens, take some back, go on with others."""
    model = tiny_model(*sizes)
    rows = [random_ids(prompt), random_ids(max(prompt - pads, 1), seed=1)]
    ids, mask = pad_rows(rows, [0, prompt - len(rows[1])], prompt)
    cache = new_cache(model)
    step(model, cache, ids, attention_mask=mask)
    for number, (written, removed) in enumerate(moves):
        new = random_ids(2, written, seed=number + 2)
        step(model, cache, new)
        removed = min(removed, written)
        cache.crop(-removed)
        rows = [torch.cat((row, new[b, : written - removed])) for b, row in enumerate(rows)]
    probe = random_ids(2, 3, seed=99)
    logits = step(model, cache, probe)
    assert cache.get_seq_length() == prompt + sum(w - min(r, w) for w, r in moves) + 3
    for b, row in enumerate(rows):
        expected = logits_alone(model, torch.cat((row, probe[b])))[-3:]
        torch.testing.assert_close(logits[b], expected, **TOLERANCE)


def test_crop_across_many_windows_when_recorded():
    model, ids = tiny_model(4, 2), random_ids(1, 40)
    cache = new_cache(model)
    step(model, cache, ids[:, :10])
    cache.activate_past_recording()
    step(model, cache, ids[:, 10:33])
    cache.crop(-21)
    logits = step(model, cache, ids[:, 12:])
    torch.testing.assert_close(logits[0], logits_alone(model, ids[0])[12:], **TOLERANCE)


def test_crop_says_what_it_cannot_do():
    model, ids = tiny_model(4, 2), random_ids(1, 40)
    cache = new_cache(model)
    step(model, cache, ids)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-30)
    assert cache.get_seq_length() == 40  # nothing happened
    with pytest.raises(ValueError, match="<= 0"):
        cache.crop(5)
    cache.crop(-36)  # a window border needs no raw keys
    torch.testing.assert_close(step(model, cache, ids[:, 4:])[0], logits_alone(model, ids[0])[4:], **TOLERANCE)


@given(order=st.lists(st.integers(0, 2), min_size=1, max_size=4), lengths=st.tuples(*[st.integers(1, 30)] * 3))
def test_rows_can_be_chosen_repeated_and_reordered(order, lengths):
    model = tiny_model()
    rows = [random_ids(n, seed=row) for row, n in enumerate(lengths)]
    ids, mask = pad_rows(rows, [max(lengths) - n for n in lengths], max(lengths))
    cache = new_cache(model)
    step(model, cache, ids, attention_mask=mask)
    cache.batch_select_indices(torch.tensor(order))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.arange(2 * len(order)).flip(0))
    cache.crop(-1)
    rows = [rows[row] for row in order for _ in range(2)][::-1]
    new = random_ids(len(rows), 20, seed=7)
    logits = step(model, cache, new)
    for b, row in enumerate(rows):
        expected = logits_alone(model, torch.cat((row[:-1], new[b])))[-20:]
        torch.testing.assert_close(logits[b], expected, **TOLERANCE)


def test_reset():
    model, ids = tiny_model(), random_ids(1, 50)
    cache = new_cache(model)
    step(model, cache, random_ids(3, 37))
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(step(model, cache, ids)[0], logits_alone(model, ids[0]), **TOLERANCE)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    rounds=st.lists(st.integers(0, 10_000), min_size=1, max_size=3),
    nodes=st.integers(1, 20),
    sizes=windows,
    backend=backends,
)
def test_trees_on_any_state(lengths, rounds, nodes, sizes, backend):
    """Every node of a tree sees its path as if that were the text, across window borders too; then a path is kept."""
    model = tiny_model(*sizes, backend=backend)
    rows = [random_ids(n, seed=row) for row, n in enumerate(lengths)]
    ids, mask = pad_rows(rows, [max(lengths) - n for n in lengths], max(lengths))
    cache = new_cache(model)
    step(model, cache, ids, attention_mask=mask)
    for seed in rounds:
        generator = torch.Generator().manual_seed(seed)
        tree = torch.eye(nodes, dtype=torch.bool)
        for node in range(1, nodes):
            tree[node] |= tree[max(0, node - 1 - int(torch.randint(3, (), generator=generator)))]
        draft = random_ids(len(rows), nodes, seed=seed)
        logits = step(model, cache, draft, draft_tree=tree[None])
        paths = [tree[int(torch.randint(nodes, (), generator=generator))].nonzero().flatten() for _ in rows]
        for node in torch.randperm(nodes, generator=generator)[:4].tolist():
            for b, row in enumerate(rows):
                expected = logits_alone(model, torch.cat((row, draft[b, tree[node]])))[-1]
                torch.testing.assert_close(logits[b, node], expected, **TOLERANCE)
        rows = [torch.cat((row, draft[b, path])) for b, (row, path) in enumerate(zip(rows, paths, strict=True))]
        kept = KeptPaths([path.tolist() for path in paths])
        for layer in cache.layers:
            layer.commit(kept)
    probe = random_ids(len(rows), 2, seed=5)
    logits = step(model, cache, probe)
    for b, row in enumerate(rows):
        torch.testing.assert_close(logits[b], logits_alone(model, torch.cat((row, probe[b])))[-2:], **TOLERANCE)


@given(
    batches=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2), min_size=2, max_size=3),
    more=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    sizes=windows,
)
def test_rows_of_other_caches_join(batches, more, sizes):
    model, rows, caches = tiny_model(*sizes), [], []
    for lengths in batches:
        joining = [random_ids(n, seed=len(rows) + place) for place, n in enumerate(lengths)]
        ids, mask = pad_rows(joining, [0] * len(joining), max(lengths))
        caches.append(new_cache(model))
        step(model, caches[-1], ids, attention_mask=mask)
        rows += joining
    cache, *others = caches
    for layer, *joining in zip(cache.layers, *(other.layers for other in others), strict=True):
        layer.append_rows(joining)
    for count in more:
        new = random_ids(len(rows), count, seed=count)
        logits = step(model, cache, new)
        for row, tokens in enumerate(rows):
            rows[row] = torch.cat((tokens, new[row]))
            torch.testing.assert_close(logits[row], logits_alone(model, rows[row])[-count:], **TOLERANCE)
    assert cache.layers[0].lengths == tuple(map(len, rows))
    assert cache.get_seq_length() == max(map(len, rows))
    assert not any(cache.layers[0].closed_windows)
    if min(len(row) % sizes[0] for row in rows):  # within the open windows there is a way back
        cache.crop(-1)
        logits = step(model, cache, torch.stack([row[-1:] for row in rows]))
        for row, tokens in enumerate(rows):
            torch.testing.assert_close(logits[row, -1], logits_alone(model, tokens)[-1], **TOLERANCE)


def test_rows_cannot_join_what_is_empty_or_of_fixed_size():
    model = tiny_model()
    filled, empty = new_cache(model), new_cache(model)
    fixed = EvaStaticCache(model.config, 64)
    step(model, filled, random_ids(1, 5))
    step(model, fixed, random_ids(1, 5))
    for one, other in ((filled, empty), (empty, filled), (fixed, filled), (filled, fixed)):
        with pytest.raises(ValueError, match="dynamic caches that hold tokens"):
            one.layers[0].append_rows([other.layers[0]])


def test_memory_grows_by_a_summary_per_chunk():
    """At length N: two windows of raw keys and N / c summaries, at most doubled by growth in advance."""
    model = tiny_model(16, 4)
    cache = new_cache(model)
    for _ in range(40):
        step(model, cache, random_ids(1, 7))
        step(model, cache, random_ids(1, 30))
        layer, length = cache.layers[0], cache.get_seq_length()
        set_aside = sum(keys.shape[1] for keys, _ in layer.closed_windows[0])
        rows = layer.keys.shape[2] + set_aside
        assert rows <= 2 * (length / 4) + 3 * 16


def test_gradients_flow_through_a_cache():
    """Two cached calls have the gradients of one forward."""
    model, ids = tiny_model(dtype=torch.float64), random_ids(2, 45)
    weights = torch.randn(2, 45, 320, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for cut in (None, 21):
        model.zero_grad()
        if cut is None:
            logits = model(ids, use_cache=False).logits
        else:
            cache = new_cache(model)
            first = model(ids[:, :cut], past_key_values=cache).logits
            second = model(ids[:, cut : cut + 1], past_key_values=cache).logits
            third = model(ids[:, cut + 1 :], past_key_values=cache).logits
            logits = torch.cat((first, second, third), dim=1)
        (logits * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-8, rtol=1e-6)


def test_a_cache_made_for_another_model_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model\.config\)"):
        model(random_ids(1, 4), past_key_values=DynamicCache())
    cache = new_cache(model)
    step(model, cache, random_ids(2, 4))
    with pytest.raises(ValueError, match="holds 2 rows"):
        step(model, cache, random_ids(3, 4))
