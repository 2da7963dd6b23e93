"""Alignment of two tokenisations of one text, for Approximate Likelihood Matching (ALM, arXiv 2503.20083).

A chunk is a run of teacher tokens and a run of student tokens that cover the same text, as short as possible: it ends
wherever a token ends at the same place on both sides. Chunks are kept as the chunk id of each token, -1 for tokens in
none, rather than as the dense matrices [tokens, chunks] of the paper's code; `alignment_matrix` gives those.
"""

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]


def align(teacher_ends: Ints, student_ends: Ints, starts: Ints | int = 0) -> tuple[Ints, Ints]:
    """Chunk ids of two tokenisations of one text, in time linear in the tokens and in the text.

    Args:
        teacher_ends: int64 [T], where each token ends in the text both sides share, in bytes or in any other unit. Ends
            never decrease. A token that ends where the one before it ends is but the beginning of the next token (of a
            character, say, or of a piece of a chat template). -1 keeps a token out of all chunks.
        student_ends: int64 [S], the same of the student.
        starts: place or places [D] where the text starts, and at which no chunk ends.

    Returns:
        int64 [T] and int64 [S]: the chunk of each token, counted from 0 on both sides; -1 for tokens left out, and
        for those behind the last place where tokens of both sides end (as when one side is cut short).
    """
    both = (teacher_ends, student_ends)
    limit = min(int(ends.max(initial=0)) for ends in both) + 1  # one bin for all that lies further back
    places = [np.minimum(ends, limit) for ends in both]
    shared = np.ones(limit + 1, dtype=np.bool_)
    for place in places:
        here = np.zeros(limit + 1, dtype=np.bool_)
        here[place] = True
        shared &= here
    shared[np.minimum(starts, limit)] = shared[limit] = False
    count = np.count_nonzero(shared)

    chunks: list[Ints] = []
    for ends, place in zip(both, places, strict=True):
        closes = shared[place]
        if np.count_nonzero(closes) > count:  # tokens that end where the one before them does
            closes &= np.diff(np.maximum.accumulate(ends), prepend=0) > 0
        chunk: Ints = np.cumsum(closes) - closes
        chunk[(chunk == count) | (ends < 0)] = -1
        chunks.append(chunk)
    return chunks[0], chunks[1]


def align_documents(
    teacher_ends: Ints,
    student_ends: Ints,
    teacher_lengths: Ints,
    student_lengths: Ints,
    starts: Ints,
    most: tuple[int, int],
) -> tuple[Ints, Ints]:
    """Chunk ids of many documents at once, each cut to a maximal number of tokens: `align` of each, but faster.

    Args:
        teacher_ends: int64 [T], of all documents one after the other. Ends count on from document to document.
        student_ends: int64 [S], the same of the student.
        teacher_lengths: int64 [D], number of tokens of each document.
        student_lengths: int64 [D], the same of the student.
        starts: int64 [D], place where each document starts, behind the last end of the one before it.
        most: number of teacher and of student tokens behind which documents are cut.

    Returns:
        int64 [T] and int64 [S]: the chunk of each token, counted from 0 in each document; -1 for none.
    """
    numbers = np.arange(len(teacher_lengths))
    documents = [np.repeat(numbers, lengths) for lengths in (teacher_lengths, student_lengths)]
    first_tokens = [np.cumsum(lengths) - lengths for lengths in (teacher_lengths, student_lengths)]
    aligned = align(teacher_ends, student_ends, starts)
    last = [last_tokens(chunks) for chunks in aligned]
    owner = documents[0][last[0]]  # the document in which each chunk ends
    kept = [place - first[owner] < limit for place, first, limit in zip(last, first_tokens, most, strict=True)]
    # Chunk -1 stands for none, and a chunk that a document leaves unfinished ends in a later one.
    owner = np.append(np.where(kept[0] & kept[1], owner, -1), -1)
    first_chunks = np.searchsorted(documents[0][last[0]], numbers)
    teacher, student = (
        np.where(owner[chunks] == document, chunks - np.repeat(first_chunks, lengths), -1)
        for chunks, document, lengths in zip(aligned, documents, (teacher_lengths, student_lengths), strict=True)
    )
    return teacher, student


def last_tokens(chunks: Ints) -> Ints:
    """Position of the last token of each chunk, int64 [chunks], given the chunk of each token, int64 [T]."""
    positions = np.flatnonzero(chunks >= 0)
    last = np.zeros(chunks.max(initial=-1) + 1, dtype=np.int64)
    last[chunks[positions]] = positions  # of several values for one place the last one stays
    return last


def merge_chunks(chunks: Ints, closes: Bools) -> Ints:
    """Chunk ids int64 [T] after each chunk that does not close is joined with the next.

    Args:
        chunks: int64 [T], the chunk of each token, or -1.
        closes: bool [chunks], whether a merged chunk may end with this one.
    """
    merged: Ints = np.cumsum(closes) - closes
    return np.where(chunks < 0, -1, merged[chunks]) if len(closes) else chunks


def closes_before_space(
    teacher_chunks: Ints, student_chunks: Ints, teacher_spaces: Bools, student_spaces: Bools
) -> Bools:
    """Which chunks stand before a space: bool [chunks], those whose next token starts with one on both sides.

    Args:
        teacher_chunks: int64 [T], the chunk of each token, or -1.
        student_chunks: int64 [S], the same of the student.
        teacher_spaces: bool [T], whether each token starts with a space.
        student_spaces: bool [S], the same of the student.
    """
    teacher_next = np.append(teacher_spaces, False)[last_tokens(teacher_chunks) + 1]
    student_next = np.append(student_spaces, False)[last_tokens(student_chunks) + 1]
    return teacher_next & student_next


def closes_unbiased(
    teacher_chunks: Ints, student_chunks: Ints, teacher_ids: Ints, student_ids: Ints, biased_pairs: Ints
) -> Bools:
    """Which chunks end without tokenisation bias: bool [chunks], those whose last ids are no biased pair.

    Args:
        teacher_chunks: int64 [T], the chunk of each token, or -1.
        student_chunks: int64 [S], the same of the student.
        teacher_ids: int64 [T].
        student_ids: int64 [S].
        biased_pairs: int64 [P, 2], teacher id and student id of the pairs whose difference in tokenisation bias exceeds
            the threshold, in either direction.
    """
    width = max(int(student_ids.max(initial=0)), int(biased_pairs[:, 1].max(initial=0))) + 1
    last_pairs = teacher_ids[last_tokens(teacher_chunks)] * width + student_ids[last_tokens(student_chunks)]
    return ~np.isin(last_pairs, biased_pairs[:, 0] * width + biased_pairs[:, 1])


def alignment_matrix(chunks: Tensor, num_chunks: int) -> Tensor:
    """The dense form: bool [B, T, num_chunks], whether a token belongs to a chunk, given chunk ids int64 [B, T]."""
    return chunks[..., None] == torch.arange(num_chunks, device=chunks.device)


__all__ = [
    "align",
    "align_documents",
    "alignment_matrix",
    "closes_before_space",
    "closes_unbiased",
    "last_tokens",
    "merge_chunks",
]
