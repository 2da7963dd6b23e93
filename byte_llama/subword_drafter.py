"""Drafts from the vocabulary the model came from: how the word that is being written may go on.

Needs no training and no forward. The current word is cut at the last space; where no subword begins with all of it,
the longest subwords are taken off its front. Every subword that begins with the rest is a candidate, the word's end
another. Vocabularies made by byte-pair merges are in the order of frequency, so the smaller id goes first; where the
model has prediction heads, the probability they give a candidate's bytes decides.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from evabyte.byte_tree import ABSENT, ROOT, DraftTrees
from evabyte.drafters import DraftContext

from .subword_expansion import SubwordExpansion

SPACES = frozenset(b" \n\t")
RANKED_BY_HEADS = 64  # candidates that the heads, if there are any, choose among


class SubwordDrafter:
    """Completions of the word being written, as a tree per row.

    Args:
        tokens: the byte string of every subword by id; None for special tokens (see `token_bytes`).
        nodes: size of a tree, without its root.
        first_byte_id: the id of byte 0 in the model's vocabulary; bytes have consecutive ids.

    Raises:
        ValueError: for a size that is not positive, or a vocabulary without subwords.
    """

    def __init__(self, tokens: Iterable[bytes | None], nodes: int = 12, first_byte_id: int = 0) -> None:
        if nodes < 1:
            raise ValueError(f"`nodes` must be at least 1, got {nodes}.")
        known = sorted((token, number) for number, token in enumerate(tokens) if token)
        if not known:
            raise ValueError("`tokens` has no subword: pass what `token_bytes(tokenizer)` returns.")
        self.nodes, self.first_byte_id = nodes, first_byte_id
        self._tokens = [token for token, _ in known]
        self._ids = np.array([number for _, number in known])
        self._longest = max(map(len, self._tokens))
        self.completions = lru_cache(65536)(self._completions)

    def _range(self, prefix: bytes) -> tuple[int, int]:
        """The places of the tokens that begin with `prefix`."""
        end = bisect_left(self._tokens, prefix + b"\xff" * self._longest)
        begin = bisect_left(self._tokens, prefix)
        while end < len(self._tokens) and self._tokens[end].startswith(prefix):
            end += 1
        return begin, end

    def _completions(self, word: bytes, count: int) -> tuple[bytes, ...]:
        """The most frequent bytes to follow `word`, at most `count` strings; a space where it may be complete."""
        while word:
            begin, end = self._range(word)
            whole = begin < end and self._tokens[begin] == word
            if end - begin > whole:
                break
            size = next(
                (size for size in range(min(len(word), self._longest), 0, -1) if self._is_token(word[:size])), 1
            )
            if size == len(word):  # nothing goes on with it: the word ends here
                return (b" ",)
            word = word[size:]
        else:
            return ()
        ids = self._ids[begin:end]
        best = np.argpartition(ids, count - 1)[:count] if len(ids) > count else np.arange(len(ids))
        best = best[np.argsort(ids[best])]
        return tuple(self._tokens[begin + place][len(word) :] + b" " for place in best)

    def _is_token(self, word: bytes) -> bool:
        place = bisect_left(self._tokens, word)
        return place < len(self._tokens) and self._tokens[place] == word

    def _word(self, text: Sequence[int]) -> bytes:
        """The bytes from the last space on, that space included; empty right behind something that is no byte."""
        word = bytearray()
        for id_ in reversed(text[-4 * self._longest :]):
            byte = id_ - self.first_byte_id
            if not 0 <= byte < 256:
                break
            word.append(byte)
            if byte in SPACES:
                break
        return bytes(reversed(word))

    def _candidates(self, text: Sequence[int], head_log_probs: list[list[float]] | None) -> Iterable[bytes]:
        if head_log_probs is None:
            return self.completions(self._word(text), self.nodes)
        found = self.completions(self._word(text), RANKED_BY_HEADS)

        def surprise(completion: bytes) -> float:  # per byte that a head speaks of
            pairs = list(zip(head_log_probs, completion, strict=False))
            return -sum(head[byte + self.first_byte_id] for head, byte in pairs) / len(pairs)

        return sorted(found, key=surprise)

    def draft(self, context: DraftContext) -> DraftTrees:
        heads = None
        if context.head_logits.shape[1]:
            heads = (context.head_logits / context.temperature).log_softmax(-1).tolist()
        trees = [
            self._tree(self._candidates(text, None if heads is None else heads[row]))
            for row, text in enumerate(context.texts)
        ]
        return _side_by_side(context.root, trees, self.first_byte_id)

    def _tree(self, completions: Iterable[bytes]) -> list[tuple[int, int]]:
        """Parent and byte of each node behind the root: the completions' common trie, cut at the size of a tree."""
        numbers: dict[tuple[int, int], int] = {}
        for completion in completions:
            at = 0
            for byte in completion:
                if (at, byte) not in numbers:
                    if len(numbers) == self.nodes:
                        return list(numbers)
                    numbers[at, byte] = len(numbers) + 1
                at = numbers[at, byte]
        return list(numbers)


def subwords_of(expansion: SubwordExpansion) -> list[bytes | None]:
    """The byte string of every subword by id, read back from the table of an expansion; None for those not in it.

    Each slot of the trie holds its parent's slot and its own symbol, and the trie begins with a subword's last byte:
    the way from a slot to the root spells the subword.
    """
    edges, outputs = expansion.edges.cpu().numpy().astype(np.int64), expansion.outputs.cpu().numpy()
    parent, symbol = np.divmod(edges, expansion.num_symbols)
    root = len(edges)
    # A slot where no subword ends carries the longest one on the way to it, like its parent.
    slots = np.flatnonzero(edges >= 0)
    slots = slots[outputs[slots] != outputs[parent[slots]]]
    subwords, at, bytes_ = outputs[slots], slots, []
    while (at != root).any():
        inside = at != root
        bytes_.append(np.where(inside, symbol[np.minimum(at, root - 1)] - 1, -1))
        at = np.where(inside, parent[np.minimum(at, root - 1)], root)
    found: list[bytes | None] = [None] * (int(subwords.max(initial=-1)) + 1)
    for subword, path in zip(subwords.tolist(), np.stack(bytes_, axis=1).tolist() if bytes_ else [], strict=True):
        path = path[: path.index(-1)] if -1 in path else path
        if max(path) < 256:  # ids beyond the bytes stand for special tokens and template words
            found[subword] = bytes(path)
    return found


def _side_by_side(root: Tensor, trees: list[list[tuple[int, int]]], first_byte_id: int) -> DraftTrees:
    """Trees of parents and bytes as tensors, places that a row does not fill being absent."""
    most = max(map(len, trees))
    ids, parents, deepest = root[:, None].cpu().repeat(1, most + 1), torch.full((len(trees), most + 1), ABSENT), 0
    parents[:, 0] = ROOT
    for row, nodes in enumerate(trees):
        depth = [0]
        for number, (parent, byte) in enumerate(nodes, start=1):
            ids[row, number], parents[row, number] = byte + first_byte_id, parent
            depth.append(depth[parent] + 1)
        deepest = max(deepest, *depth)
    return DraftTrees(ids.to(root.device), parents.to(root.device), deepest)


__all__ = ["SubwordDrafter", "subwords_of"]
