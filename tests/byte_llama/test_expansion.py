"""Subword expansion against the reference's numbers and a plain scan."""

import hashlib
import json
import os
import re
from itertools import chain
from pathlib import Path

import pytest
import torch
from goldens_io import GOLDENS
from hypothesis import given
from hypothesis import strategies as st

from byte_llama.subword_expansion import SubwordExpansion, align_right, parents_of
from byte_llama.subword_table import build_table, entries_from_dictionary, entries_from_tokens, to_dictionary

EXPAND = GOLDENS / "byte_llama" / "expand"
SOURCES = ["llama3_1", "gemma2"]


def expansion_of(dictionary, special_ids=(), maxlen=16):
    return SubwordExpansion.from_table(build_table(entries_from_dictionary([dictionary, list(special_ids)], maxlen)))


def expand(expansion, ids, past=None, **kwargs):
    """Subword ids of one row, as a list."""
    past = expansion.as_symbols(torch.tensor([past])) if past else None
    if past is not None:
        past = align_right(past, expansion.maxlen)[0]
    return expansion(expansion.as_symbols(torch.tensor([ids], dtype=torch.int64), **kwargs), past)[0].tolist()


def scan(ids, dictionary, maxlen=16):
    """The longest entry that ends at each position, by trying them all."""
    found = []
    for end in range(1, len(ids) + 1):
        suffixes = (ids[start:end] for start in range(max(0, end - maxlen), end))
        keys = (",".join(str(i + 1) for i in reversed(suffix)) for suffix in suffixes)
        found.append(next((dictionary[key] - 1 for key in keys if key in dictionary), 0))
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_real_vocabularies(source):
    golden = json.loads((EXPAND / f"pairs_{source}.json").read_text())
    expansion = expansion_of(golden["restricted_dict"], golden["special_ids"], golden["expand_input_ids_maxlen"])
    for pair in golden["pairs"]:
        ids, expected = pair["byte_ids"], pair["expanded"]
        assert expand(expansion, ids) == expected  # the restricted dictionary has no two candidates
        if len(ids) >= 3:
            assert expand(expansion, ids[-3:], past=ids[:-3]) == pair["expanded_last_3"][-3:]


def edge_cases():
    cases = json.loads((EXPAND / "edge_cases.json").read_text())["cases"]
    return [pytest.param(case, id=case["name"]) for case in cases]


@pytest.mark.parametrize("case", edge_cases())
def test_edge_cases(case):
    expansion = expansion_of(case["dict"], case["special_ids"], case["maxlen"])
    for row, ids in enumerate(case["input_ids"]):
        if case["expanded"] == "KeyError":  # the reference fails at the id that takes the shortcut; ours has no match
            assert expand(expansion, ids) == [20, 0]
            continue
        new = min(case["last_n"] or len(ids), len(ids))
        assert expand(expansion, ids[-new:], past=ids[:-new]) == case["expanded"][row][-new:]


def read_vocabulary(source):
    """Bytes of each subword and the byte vocabulary's longer units, read from the files themselves."""
    folder = os.environ.get(f"{source.upper()}_TOKENIZER")
    if folder is None:
        pytest.skip(f"set {source.upper()}_TOKENIZER to the folder with the source's tokenizer.json")
    tokenizer = json.loads((Path(folder) / "tokenizer.json").read_text())
    facts = json.loads((GOLDENS / "byte_llama" / "tokenizer" / source / "facts.json").read_text())
    byte_of = {character: int(byte) for byte, character in facts["byte_char_table"].items()}

    def in_byte_alphabet(token):
        return bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()

    vocabulary = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    tokens = [None] * (max(vocabulary.values()) + 1)
    by_fallback = {token: index for token, index in vocabulary.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", token)}
    for token, index in vocabulary.items():
        tokens[index] = in_byte_alphabet(token) if source == "llama3_1" else token.replace("▁", " ").encode()
    ordinary = set(tokens)
    for token, index in by_fallback.items():
        tokens[index] = bytes([int(token[3:5], 16)])
        if tokens[index] in ordinary:
            tokens[index] = None  # the tokenizer writes these bytes as the ordinary token
    return tokens, {in_byte_alphabet(unit): index for unit, index in facts["other_ids"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_full_dictionary(source):
    tokens, units = read_vocabulary(source)
    facts = json.loads((EXPAND / f"full_dict_facts_{source}.json").read_text())
    entries = entries_from_tokens(tokens, units, longer="cut")
    dictionary, special_ids = to_dictionary(entries, facts["special_ids"])
    assert len(dictionary) == facts["entries"]
    assert all(dictionary[key] == value for key, value in facts["sample_500"].items())
    canonical = json.dumps([dict(sorted(dictionary.items())), special_ids], separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == facts["sha256_of_canonical_json"]

    expansion = SubwordExpansion.from_table(build_table(entries_from_dictionary([dictionary, special_ids], 16)))
    golden = json.loads((EXPAND / f"pairs_{source}.json").read_text())
    for pair in golden["pairs"]:
        expected = pair["expanded"].copy()
        for place in pair.get("ambiguous_positions", ()):
            expected[place["position"]] = max(place["candidates"])
        assert expand(expansion, pair["byte_ids"]) == expected
        # One by one they are walked, and table addresses beyond 2 ** 63 come up.
        for at, subword in enumerate(expected):
            assert expand(expansion, pair["byte_ids"][at : at + 1], past=pair["byte_ids"][:at]) == [subword]


dictionaries = st.dictionaries(
    st.lists(st.integers(1, 4), min_size=1, max_size=6).map(lambda path: ",".join(map(str, path))),
    st.integers(1, 1000),
    max_size=60,
)
texts = st.lists(st.integers(0, 5), max_size=40)  # ids 4 and 5 are in no entry


@given(dictionary=dictionaries, ids=texts, cut=st.integers(0, 40), maxlen=st.integers(1, 7))
def test_any_dictionary_in_two_pieces(dictionary, ids, cut, maxlen):
    expansion = expansion_of(dictionary, maxlen=maxlen)
    expected = scan(ids, dictionary, maxlen)
    assert expand(expansion, ids) == expected
    assert expand(expansion, ids[cut:], past=ids[:cut]) == expected[cut:]


@given(dictionary=dictionaries, ids=texts.filter(bool), starts=st.sets(st.integers(0, 39)), maxlen=st.integers(1, 7))
def test_the_walk_of_a_few_positions_is_the_lookup_of_many(dictionary, ids, starts, maxlen):
    expansion = expansion_of(dictionary, maxlen=maxlen)
    positions = torch.tensor([[0 if at in starts else 1 + at for at in range(len(ids))]])
    symbols = expansion.as_symbols(torch.tensor([ids]), positions)
    text = torch.cat((symbols.new_zeros(1, maxlen), symbols), dim=1)
    windows = text.unfold(1, maxlen + 1, 1).flip(-1)
    assert [expansion.walk(window) for window in windows[0].tolist()] == expansion.lookup(windows)[0].tolist()


def test_a_decoding_step_can_be_recorded():
    expansion = expansion_of({"1": 11, "2,1": 12})
    example = expansion.as_symbols(torch.tensor([[0]])), torch.zeros(1, 16, dtype=torch.int64)
    recorded = torch.jit.trace(expansion, example), torch.export.export(expansion, example).module()
    for ids, before, expected in ([[0]], [[0]], 10), ([[1]], [[0]], 11), ([[2]], [[0]], 0):
        new, past = (expansion.as_symbols(torch.tensor(each)) for each in (ids, before))
        past = align_right(past, 16)[0]
        assert [expand(new, past).tolist() for expand in (expansion, *recorded)] == [[[expected]]] * 3


@given(
    dictionary=dictionaries,
    documents=st.lists(texts.filter(bool), min_size=1, max_size=4),
    cut=st.integers(0, 60),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_packed_documents(dictionary, documents, cut, dtype):
    expansion = expansion_of(dictionary)
    ids = torch.tensor([list(chain.from_iterable(documents))], dtype=dtype)
    positions = torch.tensor([[position for document in documents for position in range(len(document))]], dtype=dtype)
    expected = [subword for document in documents for subword in scan(document, dictionary)]
    symbols = expansion.as_symbols(ids, positions)
    assert expansion(symbols)[0].tolist() == expected
    past = align_right(symbols[:, :cut], expansion.maxlen)[0]
    assert expansion(symbols[:, cut:], past)[0].tolist() == expected[cut:]


@given(dictionary=dictionaries, rows=st.lists(texts, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_padding_anywhere_is_passed_over(dictionary, rows, seed):
    expansion = expansion_of(dictionary)
    length = max(map(len, rows)) + 5
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (len(rows), length), generator=generator)
    real = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        place = torch.randperm(length, generator=generator)[: len(tokens)].sort().values
        ids[row, place], real[row, place] = torch.tensor(tokens, dtype=torch.int64), 1
    symbols = expansion.as_symbols(ids, real=real)
    cut = int(torch.randint(length, (), generator=generator))
    past = align_right(symbols[:, :cut], expansion.maxlen)[0]
    for subwords in (
        expansion(symbols, padded=True),
        torch.cat((expansion(symbols[:, :cut], padded=True), expansion(symbols[:, cut:], past, padded=True)), dim=1),
    ):
        assert (subwords[real == 0] == 0).all()
        for row, tokens in enumerate(rows):
            assert subwords[row][real[row] == 1].tolist() == scan(tokens, dictionary)


@given(
    dictionary=dictionaries,
    pasts=st.lists(texts, min_size=1, max_size=3),
    nodes=st.integers(1, 30),
    seed=st.integers(0, 99),
    shared=st.booleans(),
)
def test_every_node_of_a_tree_follows_its_own_path(dictionary, pasts, nodes, seed, shared):
    expansion = expansion_of(dictionary)
    generator = torch.Generator().manual_seed(seed)
    trees = 1 if shared else len(pasts)
    mask = torch.eye(nodes, dtype=torch.bool).repeat(trees, 1, 1)
    for tree in mask:
        for node in range(nodes):  # several roots, and mostly long paths
            parent = max(-1, node - 1 - int(torch.randint(3, (), generator=generator)))
            if parent >= 0:
                tree[node] |= tree[parent]
    ids = torch.randint(0, 5, (len(pasts), nodes), generator=generator)
    past = torch.cat([align_right(expansion.as_symbols(torch.tensor([p], dtype=torch.int64)), 16)[0] for p in pasts])
    subwords = expansion(expansion.as_symbols(ids), past, parents=parents_of(mask))
    for row, before in enumerate(pasts):
        for node in range(nodes):
            path = ids[row, mask[row % trees, node]].tolist()
            assert subwords[row, node] == scan(before + path, dictionary)[-1]


def test_trees_say_what_they_need():
    expansion = expansion_of({"1": 11})
    symbols = expansion.as_symbols(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="parents"):
        expansion(symbols, parents=torch.tensor([[-1, 0]]))
    with pytest.raises(ValueError, match="padding"):
        expansion(symbols, parents=torch.tensor([[-1, 0, 1]]), padded=True)


def test_every_entry_of_a_large_dictionary_is_found():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 17, (20_000,), generator=generator)
    paths = [torch.randint(1, 257, (n,), generator=generator).tolist() for n in lengths]
    dictionary = {",".join(map(str, path)): value + 1 for value, path in enumerate(paths)}
    expansion = expansion_of(dictionary)
    past = torch.zeros(len(paths), 16, dtype=torch.int64)
    for row, path in enumerate(paths):
        past[row, 17 - len(path) :] = torch.tensor(path[:0:-1])
    newest = torch.tensor([[path[0]] for path in paths])
    expected = torch.tensor([dictionary[",".join(map(str, path))] - 1 for path in paths])
    assert torch.equal(expansion(newest, past)[:, 0], expected)


def test_the_same_entries_give_the_same_table():
    entries = [entries_from_dictionary([{"1,2": 5, "3": 6, "2,2,1": 7}, []], 16) for _ in range(2)]
    first, second = (SubwordExpansion.from_table(build_table(each)).state_dict() for each in entries)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tokens_longer_than_a_match_are_dropped_or_cut():
    tokens = [b"!", b"abcde", b"xbcde", b"cde", None, b"de"]
    whole = SubwordExpansion.from_table(build_table(entries_from_tokens(tokens, {}, maxlen=4)))
    assert expand(whole, list(b"abcde")) == [0, 0, 0, 0, 3]
    cut = SubwordExpansion.from_table(build_table(entries_from_tokens(tokens, {}, maxlen=4, longer="cut")))
    assert expand(cut, list(b"abcde")) == [0, 0, 0, 0, 2]  # of the two that end in "bcde" the larger id
    with pytest.raises(ValueError, match="longer"):
        entries_from_tokens(tokens, {}, longer="keep")


def test_units_of_several_bytes_count_as_one_id():
    units = {b"user": 263, b"\n\n": 264, b"<s>": 256}
    tokens = [b"!", b"user", b"superuser", b"\n\n\n", b"s", None]
    entries = entries_from_tokens(tokens, units, counterparts={5: 256})
    expansion = SubwordExpansion.from_table(build_table(entries))
    assert expand(expansion, [263]) == [1]
    assert expand(expansion, [*b"super", 263]) == [4, 0, 0, 0, 0, 2]
    assert expand(expansion, [10, 264, 264]) == [0, 3, 0]
    assert expand(expansion, [256, ord("s")]) == [5, 4]
    dictionary, special_ids = to_dictionary(entries, [256])
    assert dictionary["265,11"] == 4 and dictionary["257"] == 6 and dictionary[""] == -1 and special_ids == [256]


@pytest.mark.parametrize(
    ("dictionary", "message"),
    [
        ({"1": 2}, "must be"),
        ([{"1,x": 2}, []], "must be"),
        ([{"1,,2": 2}, []], "must be"),
        ([{"1": None}, []], "must be"),
        ([{"0,1": 2}, []], "plus 1"),
        ([{"1": 0}, []], "plus 1"),
    ],
)
def test_malformed_dictionaries(dictionary, message):
    with pytest.raises(ValueError, match=f"expand_input_ids_dict.*{message}"):
        entries_from_dictionary(dictionary, 16)


def test_too_many_symbols_for_the_table():
    with pytest.raises(ValueError, match="too large"):
        build_table(entries_from_dictionary([{f"{2**28},1": 1}, []], 16))


@pytest.mark.slow
def test_compiles_as_one_graph():
    expansion = expansion_of({"1": 11, "2,1": 12, "3,2,1": 13})
    symbols = expansion.as_symbols(torch.randint(0, 3, (2, 50)))
    past, parents = symbols[:, :16], parents_of(torch.ones(5, 5, dtype=torch.bool).tril()[None])
    compiled = torch.compile(expansion, fullgraph=True)
    assert torch.equal(compiled(symbols), expansion(symbols))
    assert torch.equal(compiled(symbols[:, :1], past), expansion(symbols[:, :1], past))
    assert torch.equal(compiled(symbols, past, padded=True), expansion(symbols, past, padded=True))
    tree = {"parents": parents}
    assert torch.equal(compiled(symbols[:, :5], past, **tree), expansion(symbols[:, :5], past, **tree))
