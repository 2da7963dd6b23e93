"""Completions of the word being written, against a plain search of the vocabulary."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byte_llama.subword_drafter import SubwordDrafter, subwords_of
from byte_llama.subword_expansion import SubwordExpansion
from byte_llama.subword_table import build_table, entries_from_dictionary
from evabyte.byte_tree import ROOT
from evabyte.drafters import DraftContext, Drafter

TOKENS = [b" the", b" th", b" then", b" there", b"re", b" to", None, b" tomorrow", b"th", b" "]


def context(texts, head_logits=None, first=0):
    texts = [[byte + first for byte in text] for text in texts]
    root = torch.tensor([text[-1] for text in texts])
    logits = torch.zeros(len(texts), 0, 256 + first) if head_logits is None else head_logits
    return DraftContext(root=root, head_logits=logits, texts=texts, rows=list(range(len(texts))))


def paths(trees, row, first=0):
    """The strings from the root to every node of a row."""
    strings = {0: b""}
    for node in range(1, trees.ids.shape[1]):
        parent = int(trees.parents[row, node])
        if parent >= 0:
            strings[node] = strings[parent] + bytes([int(trees.ids[row, node]) - first])
    return [strings[node] for node in sorted(strings)][1:]


def test_smaller_ids_first_and_one_trie():
    drafter = SubwordDrafter(TOKENS, nodes=100)
    assert isinstance(drafter, Drafter)
    assert drafter.completions(b" th", 10) == (b"e ", b" ", b"en ", b"ere ")
    trees = drafter.draft(context([b"so th", b"go to"]))
    found = [paths(trees, row) for row in range(2)]
    assert found[0] == [b"e", b"e ", b" ", b"en", b"en ", b"er", b"ere", b"ere "]
    assert found[1] == [b" ", b"m", b"mo", b"mor", b"morr", b"morro", b"morrow", b"morrow "]
    assert trees.parents[:, 0].tolist() == [ROOT, ROOT] and trees.max_depth == 7


def test_subwords_are_taken_off_the_front():
    drafter = SubwordDrafter(TOKENS)
    assert drafter.completions(b" thr", 4) == (b"e ",)  # " th" + "r" of "re"
    assert drafter.completions(b" tomorrow", 4) == (b" ",)
    assert drafter.completions(b"", 4) == ()


def test_size_limits_and_other_ids():
    drafter = SubwordDrafter(TOKENS, nodes=2, first_byte_id=64)
    trees = drafter.draft(context([b"so th", b" tomorrow"], first=64))
    assert paths(trees, 0, first=64) == [b"e", b"e "] and paths(trees, 1, first=64) == [b" "]
    after_special = context([b"a"], first=64)
    after_special.texts[0][-1] = 11
    assert paths(drafter.draft(after_special), 0) == []


def test_heads_rank_the_candidates():
    logits = torch.zeros(1, 2, 256)
    logits[0, 0, ord("e")] = logits[0, 1, ord("r")] = 5.0
    trees = SubwordDrafter(TOKENS, nodes=2).draft(context([b"so th"], logits))
    assert paths(trees, 0) == [b"e", b"er"]


@given(
    tokens=st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=30, unique=True),
    word=st.binary(min_size=1, max_size=3),
)
def test_completions_are_those_of_a_plain_search(tokens, word):
    drafter = SubwordDrafter(tokens)
    expected = [token[len(word) :] + b" " for token in tokens if token.startswith(word)]
    if any(token.startswith(word) and token != word for token in tokens):
        assert drafter.completions(word, 5) == tuple(expected[:5])
        assert drafter.completions(word, 50) == tuple(expected)


@given(tokens=st.lists(st.binary(min_size=1, max_size=16), min_size=1, max_size=40, unique=True))
def test_subwords_read_back_from_a_table(tokens):
    paths = {",".join(str(byte + 1) for byte in reversed(token)): 2 + n for n, token in enumerate(tokens)}
    expansion = SubwordExpansion.from_table(build_table(entries_from_dictionary([paths, []], 16)))
    assert subwords_of(expansion) == [None, *tokens]


def test_what_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="token_bytes"):
        SubwordDrafter([None, b""])
    with pytest.raises(ValueError, match="nodes"):
        SubwordDrafter([b"a"], nodes=0)
