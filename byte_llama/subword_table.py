"""Building the table behind subword expansion: a trie over reversed subwords in a perfect hash.

The trie is walked from the newest byte id backwards, so the node where a walk ends is the longest suffix of the text
that is a suffix of some subword; `outputs` then names the longest whole subword on the way. Every node has a slot. The
slot of the path s_1 ... s_k (newest symbol first) is computed from the symbols alone,

    h_k = sum_j s_j * multipliers[j]  (mod 2 ** 64),
    slot_k = h_k >> SLOT_SHIFT, displaced by displacements[h_k >> BUCKET_SHIFT],

by "hash and displace" (Belazzougui, Botelho, Dietzfelbinger: Hash, displace, and compress, ESA 2009), so all prefixes
of a path are looked up at once. `edges[slot]` holds the parent's slot and the symbol: a path is in the trie if and only
if the edges along it agree, whatever else may hash to the same slots.

A symbol is a byte-vocabulary id plus 1; symbol 0 is "nothing".
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

BUCKET_SHIFT = 47
SLOT_SHIFT = 24

_LOAD_FACTOR = 0.8
_SLOTS_PER_BUCKET = 4
_MAX_SEEDS = 64
_MAX_ROUNDS = 1000

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class SubwordEntries:
    """Subwords as paths of symbols.

    Attributes:
        symbols: int64 [E, maxlen], newest symbol first, 0 behind the last one.
        subwords: int64 [E], their subword ids.
    """

    symbols: Integers
    subwords: Integers


@dataclass(frozen=True)
class SubwordTable:
    """The lookup table; see the module's text.

    Attributes:
        multipliers: int64 [maxlen + 1].
        displacements: int32 [buckets].
        edges: int32 [slots], parent slot * num_symbols + symbol; -1 in free slots. The root's slot is `slots`.
        outputs: int32 [slots + 1], subword id of the longest subword on the path to each node; 0 for none.
        num_symbols: one more than the largest symbol; that one stands for all ids in no subword.
    """

    multipliers: Integers
    displacements: NDArray[np.int32]
    edges: NDArray[np.int32]
    outputs: NDArray[np.int32]
    num_symbols: int


def entries_from_dictionary(dictionary: Sequence[Any], maxlen: int) -> SubwordEntries:
    """The entries of a published `expand_input_ids_dict`.

    Args:
        dictionary: `[{"comma-joined symbols, newest first": subword id + 1}, [special ids]]`. As in the public
            reference, a path that begins with a symbol in the second list (compared as it stands, without the plus 1)
            counts only if it is that symbol alone.
        maxlen: longest path that can match; longer ones are left out.

    Raises:
        ValueError: when `dictionary` is not of that form.
    """
    try:
        paths, special_ids = dictionary
        keys = [key for key in paths if key]
        lengths = np.fromiter((key.count(",") + 1 for key in keys), np.int64, len(keys))
        symbols = np.fromiter(map(int, ",".join(keys).split(",") if keys else ()), np.int64, lengths.sum())
        subwords = np.fromiter((paths[key] for key in keys), np.int64, len(keys)) - 1
        newest = symbols[np.cumsum(lengths) - lengths]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            "`expand_input_ids_dict` must be [{'3,2,1': subword id + 1, ...}, [special ids]], with keys that are comma-"
            f"joined byte-vocabulary ids + 1, newest first ({error})."
        ) from error
    if len(keys) and (symbols.min() < 1 or subwords.min() < 0):
        raise ValueError("`expand_input_ids_dict`: ids in keys and values are stored plus 1, so none may be below 1.")
    kept = (lengths <= maxlen) & ((lengths == 1) | ~np.isin(newest, np.asarray(special_ids, np.int64)))
    return SubwordEntries(_rows(symbols, lengths, maxlen)[kept], subwords[kept])


def entries_from_tokens(
    token_bytes: Sequence[bytes | None],
    units: Mapping[bytes, int],
    *,
    counterparts: Mapping[int, int] | None = None,
    maxlen: int = 16,
    longer: Literal["drop", "cut"] = "drop",
) -> SubwordEntries:
    """The entries of a subword vocabulary.

    Args:
        token_bytes: the bytes of each subword id, None for ids that stand for no text.
        units: the byte vocabulary's entries of more than one byte, such as {b"user": 263}; byte b itself is id b. As in
            the byte tokenizer, a text is cut from its end, each time into the longest unit that ends there.
        counterparts: subword id -> byte-vocabulary id, for special tokens of both vocabularies.
        maxlen: longest path that can match, in byte-vocabulary ids.
        longer: what happens to longer tokens. "drop" leaves them out, so that a match is a whole token. "cut" keeps
            their last `maxlen` ids, as the published dictionaries do. Of tokens with equal paths the one with the
            largest subword id counts.

    Raises:
        ValueError: for another `longer`.
    """
    if longer not in ("drop", "cut"):
        raise ValueError(f"`longer` must be 'drop' or 'cut', got {longer!r}.")
    by_length = sorted((unit for unit in units if len(unit) > 1), key=len, reverse=True)
    paths = [[unit] for unit in (counterparts or {}).values()]
    subwords = list(counterparts or {})
    for subword, token in enumerate(token_bytes):
        if token:
            path = _newest_first(token, units, [unit for unit in by_length if unit in token])
            if longer == "cut" or len(path) <= maxlen:
                paths.append(path[:maxlen])
                subwords.append(subword)
    lengths = np.fromiter(map(len, paths), np.int64, len(paths))
    symbols = np.fromiter(chain.from_iterable(paths), np.int64, lengths.sum()) + 1
    return SubwordEntries(_rows(symbols, lengths, maxlen), np.asarray(subwords, np.int64))


def _newest_first(token: bytes, units: Mapping[bytes, int], candidates: list[bytes]) -> list[int]:
    """Byte-vocabulary ids of a token, last one first; `candidates` are the units that occur in it, longest first."""
    if not candidates:
        return list(token[::-1])
    path = []
    while token:
        unit = next((unit for unit in candidates if token.endswith(unit)), token[-1:])
        path.append(units.get(unit, unit[0]) if len(unit) > 1 else unit[0])
        token = token[: -len(unit)]
    return path


def _rows(symbols: Integers, lengths: Integers, maxlen: int) -> Integers:
    """Concatenated paths as rows of `maxlen`, zeros behind the end; longer ones lose their oldest symbols."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    column = np.arange(len(symbols)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = np.zeros((len(lengths), maxlen), np.int64)
    fits = column < maxlen
    rows[row[fits], column[fits]] = symbols[fits]
    return rows


def to_dictionary(entries: SubwordEntries, special_ids: Iterable[int] = ()) -> list[Any]:
    """The published form of entries, `[{"comma-joined symbols": subword id + 1}, special ids]`.

    Of entries with equal paths the one with the largest subword id counts.
    """
    order = np.argsort(entries.subwords, kind="stable")
    paths = {"": -1}
    for symbols, subword in zip(entries.symbols[order].tolist(), entries.subwords[order].tolist(), strict=True):
        paths[",".join(str(symbol) for symbol in symbols if symbol)] = subword + 1
    return [paths, sorted(special_ids)]


@dataclass(frozen=True)
class _Level:
    """The trie's nodes at one depth, numbered after those above; the root is node 0.

    Attributes:
        nodes: their numbers.
        parents: int64 [n], numbers of their parents.
        symbols: int64 [n], the symbols that lead to them.
    """

    nodes: slice
    parents: Integers
    symbols: Integers


def build_table(entries: SubwordEntries) -> SubwordTable:
    """The table of some entries; the same entries always give the same table.

    Raises:
        ValueError: when there are too many entries for 32-bit edges.
    """
    levels, outputs = _trie(entries)
    nodes = len(outputs) - 1
    slots = 1 << max(4, int(np.ceil(np.log2(max(nodes, 1) / _LOAD_FACTOR))))
    num_symbols = int(entries.symbols.max(initial=0)) + 2
    if (slots + 1) * num_symbols >= 2**31:
        raise ValueError(
            f"The expansion dictionary is too large: {slots} slots times {num_symbols} symbols must stay below 2 ** 31."
            " Use fewer subwords."
        )
    for seed in range(_MAX_SEEDS):
        random = np.random.default_rng(seed)
        multipliers = random.integers(-(2**63), 2**63, entries.symbols.shape[1] + 1)
        hashes = np.zeros(len(outputs), np.int64)
        for level, multiplier in zip(levels, multipliers, strict=False):
            hashes[level.nodes] = hashes[level.parents] + level.symbols * multiplier
        buckets = max(slots // _SLOTS_PER_BUCKET, 1)
        bucket, base = (hashes[1:] >> BUCKET_SHIFT) & (buckets - 1), (hashes[1:] >> SLOT_SHIFT) & (slots - 1)
        displacements = _displace(bucket, base, buckets, slots, random)
        if displacements is not None:
            break
    else:
        raise ValueError(f"No perfect hash was found for {nodes} nodes with {_MAX_SEEDS} seeds.")

    slot = np.append(slots, (base + displacements[bucket]) & (slots - 1))
    edges = np.full(slots, -1, np.int32)
    for level in levels:
        edges[slot[level.nodes]] = slot[level.parents] * num_symbols + level.symbols
    by_slot = np.zeros(slots + 1, np.int32)
    by_slot[slot] = outputs
    return SubwordTable(multipliers, displacements.astype(np.int32), edges, by_slot, num_symbols)


def _trie(entries: SubwordEntries) -> tuple[list[_Level], Integers]:
    """The trie's levels, and per node the longest subword on the path to it (0 for none)."""
    order = np.lexsort((entries.subwords, *entries.symbols.T[::-1]))
    rows, subwords = entries.symbols[order], entries.subwords[order]
    last_of_equals = np.append((rows[1:] != rows[:-1]).any(axis=1), True)[: len(rows)]
    rows, subwords = rows[last_of_equals], subwords[last_of_equals]

    levels = []
    node_of_row, count = np.zeros(len(rows), np.int64), 1
    # Rows are sorted: a path is new where it differs from the row before.
    differs = np.arange(len(rows)) == 0
    for symbols in rows.T:
        differs[1:] |= symbols[1:] != symbols[:-1]
        present = symbols > 0
        new = differs & present
        levels.append(_Level(slice(count, count + int(new.sum())), node_of_row[new], symbols[new]))
        node_of_row = np.where(present, count - 1 + np.cumsum(new), node_of_row)
        count = levels[-1].nodes.stop
    own = np.full(count, -1)
    own[node_of_row] = subwords
    outputs = np.zeros(count, np.int64)
    for level in levels:
        outputs[level.nodes] = np.where(own[level.nodes] >= 0, own[level.nodes], outputs[level.parents])
    return levels, outputs


def _displace(
    bucket: Integers, base: Integers, buckets: int, slots: int, random: np.random.Generator
) -> Integers | None:
    """Displacement of each bucket such that all (base + displacement) % slots differ; None when none was found.

    Buckets are placed by decreasing size, those of one size all at a time: each tries a random displacement, and those
    whose places are free and claimed by nobody else are done.
    """
    together = np.sort(bucket * slots + base)  # not `np.unique`, which is far slower
    if (together[1:] == together[:-1]).any():
        return None
    order = np.argsort(bucket, kind="stable")
    sizes = np.bincount(bucket, minlength=buckets)
    starts = np.cumsum(sizes) - sizes
    displacements = np.zeros(buckets, np.int64)
    free = np.ones(slots, bool)
    claims = np.zeros(slots, np.int64)
    for size in range(sizes.max(initial=0), 0, -1):
        pending = np.flatnonzero(sizes == size)
        members = base[order[starts[pending, None] + np.arange(size)]]
        for _ in range(_MAX_ROUNDS):
            if not len(pending):
                break
            trial = random.integers(slots, size=len(pending))
            places = (members + trial[:, None]) & (slots - 1)
            claims[places] = pending[:, None]
            placed = (free[places] & (claims[places] == pending[:, None])).all(axis=1)
            displacements[pending[placed]] = trial[placed]
            free[places[placed]] = False
            pending, members = pending[~placed], members[~placed]
        else:
            return None
    return displacements


__all__ = [
    "SubwordEntries",
    "SubwordTable",
    "build_table",
    "entries_from_dictionary",
    "entries_from_tokens",
    "to_dictionary",
]
