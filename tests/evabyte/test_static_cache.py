"""A cache of fixed size and compiled steps give the bytes of the dynamic cache, from one graph."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fresh_model, pad_left, random_ids, tiny_model
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig

from evabyte import EvaByteForCausalLM, EvaByteTokenizer
from evabyte.bundled import bundled_checkpoint
from evabyte.byte_tree import DraftTrees
from evabyte.eva_static_cache import EvaStaticCache, static_cache_bytes

EAGER = {"cache_implementation": "static", "disable_compile": True}
GRAPH = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}  # Dynamo, no kernels
DRAFTS = ["chain", "tree31", "dynamic", "lookup", "dynamic+lookup"]


def greedy(count, **more):
    return {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, **more}


@settings(max_examples=16)
@given(
    lengths=st.lists(st.integers(1, 36), min_size=1, max_size=3),
    count=st.integers(1, 40),
    draft=st.sampled_from([None, *DRAFTS]),
    sizes=st.sampled_from([(16, 4), (6, 3), (4, 2)]),
    eos=st.lists(st.integers(64, 319), max_size=40),
)
def test_greedy_equals_the_dynamic_cache(lengths, count, draft, sizes, eos):
    """Windows of 4 to 16 bytes: every few steps a row stands at a border; rows end at different steps."""
    model = tiny_model(*sizes)
    ids, mask = pad_left([random_ids(n, seed=row) for row, n in enumerate(lengths)])
    how = greedy(count, attention_mask=mask) | {"eos_token_id": eos or None}
    expected = model.generate(ids, **how)
    static = model.generate(ids, **EAGER, **how) if draft is None else None
    if draft is not None:
        static = model.multi_byte_generate(ids, draft=draft, **EAGER, **how)
    assert torch.equal(static, expected)


@settings(max_examples=6)
@given(length=st.integers(1, 30), seed=st.integers(0, 1000), draft=st.sampled_from(DRAFTS))
def test_sampling_draws_the_same_bytes(length, seed, draft):
    model, ids = tiny_model(), random_ids(1, length, seed=seed)
    how = {"max_new_tokens": 25, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "eos_token_id": None}
    torch.manual_seed(seed)
    expected = model.generate(ids, **how)
    torch.manual_seed(seed)
    assert torch.equal(model.multi_byte_generate(ids, draft=draft, **EAGER, **how), expected)


def test_processors_scores_and_end_of_text():
    model, ids = tiny_model(), random_ids(2, 21)
    how = greedy(30, repetition_penalty=1.3, return_dict_in_generate=True, output_logits=True)
    how["eos_token_id"] = list(range(64, 80))
    plain = model.multi_byte_generate(ids, return_trace=True, **how)
    static = model.multi_byte_generate(ids, return_trace=True, **EAGER, **how)
    assert torch.equal(static.sequences, plain.sequences)
    for mine, its in zip(static.logits, plain.logits, strict=True):
        torch.testing.assert_close(mine, its)


def test_beams_and_continued_caches():
    model = tiny_model()
    ids, mask = pad_left([random_ids(14), random_ids(9, seed=1)])
    beams = greedy(24, num_beams=3, attention_mask=mask)
    assert torch.equal(model.generate(ids, **EAGER, **beams), model.generate(ids, **beams))

    expected = model.generate(ids[:1], **greedy(40))
    cache = EvaStaticCache(model.config, 60, tree_nodes=32)
    begun = model.multi_byte_generate(ids[:1], past_key_values=cache, disable_compile=True, **greedy(17))
    assert cache.get_seq_length() == begun.shape[1] - 1
    assert torch.equal(model.generate(begun, past_key_values=cache, disable_compile=True, **greedy(23)), expected)


@settings(max_examples=12)
@given(first=st.integers(1, 40), more=st.integers(1, 20), removed=st.integers(0, 50))
def test_crop_and_reset(first, more, removed):
    """What a recorded past allows to take back is taken back; then the next bytes are as on a new dynamic cache."""
    model = tiny_model()
    ids, next_ids = random_ids(1, first + more), random_ids(1, 7, seed=2)
    static = EvaStaticCache(model.config, 80)
    static.activate_past_recording()
    with torch.no_grad():
        for part in ids.split((first, more), dim=1):
            model(part, past_key_values=static)
        left = max(first + more - removed, 0)
        static.crop(-removed)
        seen = model(next_ids, past_key_values=static).logits
        torch.testing.assert_close(seen, model(torch.cat((ids[:, :left], next_ids), dim=1)).logits[:, left:])
        addresses = [layer.keys.data_ptr() for layer in static.layers]
        static.reset()
        torch.testing.assert_close(model(ids, past_key_values=static).logits, model(ids).logits)
    assert addresses == [layer.keys.data_ptr() for layer in static.layers]


@pytest.mark.parametrize(("length", "nodes", "batch"), [(1, 1, 1), (15, 32, 2), (16, 9, 1), (300, 96, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_known_beforehand(length, nodes, batch, dtype):
    model = fresh_model(dtype=dtype)
    cache = EvaStaticCache(model.config, length, tree_nodes=nodes)
    with torch.no_grad():
        model(random_ids(batch, min(length, 40)), past_key_values=cache)
        owned = [states for layer in cache.layers for states in (layer.keys, layer.values)]
        before = [states.data_ptr() for states in owned]
        for _ in range(min(length - min(length, 40), 40)):
            model(random_ids(batch, 1), past_key_values=cache)
    assert sum(states.nbytes for states in owned) == static_cache_bytes(model.config, batch, length, nodes, dtype)
    assert before == [states.data_ptr() for layer in cache.layers for states in (layer.keys, layer.values)]
    assert not any(any(layer.closed_windows) for layer in cache.layers)


def test_too_long_is_refused_before_anything_is_written():
    model, ids = tiny_model(), random_ids(1, 30)
    cache = EvaStaticCache(model.config, 29, tree_nodes=4)
    with torch.no_grad(), pytest.raises(ValueError, match="room for 29 tokens a row, and 30 are needed"):
        model(ids, past_key_values=cache)
    assert not cache.layers[0].is_initialized
    with torch.no_grad():
        model(ids[:, :29], past_key_values=cache)
        kept = cache.layers[0].keys.clone()
        for step in (model, model.get_compiled_call(CompileConfig(backend="eager"))):
            with pytest.raises(ValueError, match="`max_cache_len`"):
                step(input_ids=ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="draft trees of 4 nodes, and this one has 5"):
            model(ids[:, :5], past_key_values=cache, draft_tree=torch.ones(1, 5, 5, dtype=torch.bool).tril())
    assert torch.equal(kept, cache.layers[0].keys) and cache.get_seq_length() == 29


def test_what_does_not_fit_is_refused():
    model, ids = tiny_model(), random_ids(2, 9)
    cache = EvaStaticCache(model.config, 40, tree_nodes=4)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="keeps its 2 rows, and 1 are asked for"):
        cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ValueError, match="keeps its 2 rows, and 4 are asked for"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="make it with `tree_nodes=5`"):
        model.multi_byte_generate(torch.cat((ids, ids[:, :1]), dim=1), past_key_values=cache, **greedy(5))
    with pytest.raises(ValueError, match="stays on its device"):
        model.generate(ids, cache_implementation="offloaded_static", **greedy(5))
    for name in ("max_cache_len", "tree_nodes"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
            EvaStaticCache(model.config, **{"max_cache_len": 5, name: 0})


def test_a_drafter_of_ones_own_gets_room_for_its_trees():
    class Alphabet:
        """Deeper than the heads reach, and without `bounds`."""

        def draft(self, context):
            rows, size = len(context.rows), 1 + len(context.texts[0]) % 20
            ids = torch.arange(160, 160 + size).repeat(rows, 1)
            ids[:, 0] = context.root
            return DraftTrees(ids, torch.arange(-1, size - 1).expand(rows, -1), size - 1)

    model, ids = tiny_model(), random_ids(2, 11)
    expected = model.generate(ids, **greedy(30))
    assert torch.equal(model.multi_byte_generate(ids, draft=Alphabet(), **EAGER, **greedy(30)), expected)


def test_the_stock_static_cache():
    model, ids = tiny_model(), random_ids(2, 21)
    with torch.no_grad():
        static, dynamic = StaticCache(config=model.config, max_cache_len=60), DynamicCache(config=model.config)
        for part in ids.split((18, 1, 2), dim=1):
            expected = model(part, past_key_values=dynamic).logits
            torch.testing.assert_close(model(part, past_key_values=static).logits, expected)
    assert type(dynamic.layers[0]) is not type(static.layers[0])


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.compatibility("Static cache, torch.compile", "EvaByte")
@pytest.mark.compatibility("multi_byte_generate on a static cache, one compiled step", "EvaByte")
def test_one_graph_serves_all_steps():
    """Prompts of other lengths, window borders, rows that end, sampling: no step is compiled again."""
    model = fresh_model(num_hidden_layers=1)
    ids, mask = pad_left([random_ids(14), random_ids(37, seed=1)])
    how = greedy(50, attention_mask=mask)
    before = graphs()
    assert torch.equal(model.multi_byte_generate(ids, **GRAPH, **how), model.generate(ids, **how))
    assert graphs() == before + 1
    others, mask = pad_left([random_ids(3, seed=4), random_ids(9, seed=5)])
    how = greedy(70, attention_mask=mask) | {"eos_token_id": list(range(64, 70))}
    assert torch.equal(model.multi_byte_generate(others, **GRAPH, **how), model.generate(others, **how))
    model.multi_byte_generate(others, attention_mask=mask, max_new_tokens=20, do_sample=True, temperature=1.7, **GRAPH)
    assert graphs() == before + 1
    for prompts, size in ((ids, 50), (others, 70)):
        assert torch.equal(model.generate(prompts, **GRAPH, **greedy(size)), model.generate(prompts, **greedy(size)))
    assert graphs() == before + 2


@pytest.mark.slow
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_by_inductor(draft, batch):
    model = fresh_model()
    ids, mask = pad_left([random_ids(n, seed=n) for n in (14, 37, 5)[:batch]])
    for how in (greedy(60, attention_mask=mask), greedy(30, attention_mask=mask, repetition_penalty=1.2)):
        static = model.multi_byte_generate(ids, draft=draft, cache_implementation="static", **how)
        assert torch.equal(static, model.generate(ids, **how))


@pytest.mark.slow
def test_generate_compiled_by_inductor():
    model = fresh_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                        max_position_embeddings=32)  # fmt: skip
    ids, mask = pad_left([random_ids(14), random_ids(37, seed=1)])
    how = greedy(50, attention_mask=mask)
    assert torch.equal(model.generate(ids, cache_implementation="static", **how), model.generate(ids, **how))


@pytest.mark.slow
def test_int8_weights_through_the_compiled_step():
    """torchao's weight-only int8 writes what it writes on the dynamic cache, and nearly what float32 would predict."""
    quantization = pytest.importorskip("torchao.quantization")
    model = EvaByteForCausalLM.from_pretrained(bundled_checkpoint(), dtype=torch.float32).eval()
    text = (Path(__file__).parents[2] / "docs" / "multibyte_decoding.md").read_bytes()[:700]
    ids = torch.tensor([EvaByteTokenizer().encode_bytes(text)])
    with torch.no_grad():
        expected = model(ids).logits.argmax(-1)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        assert (model(ids).logits.argmax(-1) == expected).double().mean() > 0.95
    linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    stored = sum(part.nbytes for weight in linear for part in (weight.qdata, weight.scale))
    assert stored < 0.27 * sum(weight.numel() * 4 for weight in linear)
    how = greedy(60)
    static = model.multi_byte_generate(ids[:, :300], cache_implementation="static", **how)
    dynamic = model.multi_byte_generate(ids[:, :300], **how)
    assert (static == dynamic).long().cumprod(-1).double().mean() > 0.9
