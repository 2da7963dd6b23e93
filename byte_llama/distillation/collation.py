"""Batches of examples: padding on the right, and packing of several documents into one row."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .encoding import Example, TokenSequence
from .losses import IGNORED


@dataclass(frozen=True)
class DistillationCollator:
    """Makes a batch of examples, padded on the right.

    A batch holds, as int64 [B, S] for the student and, with a teacher, as int64 [B, T] under `teacher_...`:

        input_ids       ids
        attention_mask  1 where there is an id; not in packed batches
        position_ids    in packed batches only: they start again at 0 with each document, and with the padding. Models
                        of transformers keep such documents apart when they are given no attention mask and
                        `use_cache=False`.
        labels          ids that losses count, else -100; not shifted. Never the first id of a row or document,
                        which nothing predicts.
        chunks          with a teacher: the chunk of each id, -1 for none; ids of one chunk have the same text

    Args:
        student_pad_id, teacher_pad_id: what rows are filled up with.
        student_length, teacher_length: fixed row lengths, which spare compiled models new shapes. Default: the longest
            of the batch.
        packed: whether examples may hold several documents.

    Raises:
        ValueError: from a call, where an example does not fit a fixed length, examples with and without a teacher are
            mixed, or packed examples come unannounced.
    """

    student_pad_id: int = 0
    teacher_pad_id: int = 0
    student_length: int | None = None
    teacher_length: int | None = None
    packed: bool = False

    @classmethod
    def from_tokenizers(
        cls,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        student_length: int | None = None,
        teacher_length: int | None = None,
        packed: bool = False,
    ) -> "DistillationCollator":
        """A collator that fills up with the padding tokens; with id 0 where a tokenizer has none, as all is masked."""
        student_pad_id, teacher_pad_id = (
            getattr(tokenizer, "pad_token_id", None) or 0 for tokenizer in (student_tokenizer, teacher_tokenizer)
        )
        return cls(student_pad_id, teacher_pad_id, student_length, teacher_length, packed)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        teachers = [example.teacher for example in examples if example.teacher is not None]
        if len(teachers) not in (0, len(examples)):
            raise ValueError(
                "examples of one batch must all have a teacher sequence, or none: use one encoder for all."
            )
        students = [example.student for example in examples]
        batch = self._pad(students, self.student_pad_id, self.student_length, "student_length")
        if not teachers:
            del batch["chunks"]
            return batch
        teacher = self._pad(teachers, self.teacher_pad_id, self.teacher_length, "teacher_length")
        return batch | {f"teacher_{name}": tensor for name, tensor in teacher.items()}

    def _pad(self, rows: Sequence[TokenSequence], pad_id: int, length: int | None, argument: str) -> dict[str, Tensor]:
        longest = max(map(len, rows))
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"{argument} is {length}, but an example has {longest} ids: cut or pack to that length.")
        if not self.packed and any((row.positions[1:] == 0).any() for row in rows):
            raise ValueError("examples hold several documents: make the collator with packed=True.")

        def stack(arrays: Iterable[NDArray], fill: int) -> Tensor:
            stacked = np.full((len(rows), length), fill, dtype=np.int64)
            for target, array in zip(stacked, arrays, strict=True):
                target[: len(array)] = array
            return torch.from_numpy(stacked)

        counted = [row.trained & (row.positions > 0) for row in rows]
        batch = {
            "input_ids": stack((row.ids for row in rows), pad_id),
            "labels": stack((np.where(on, row.ids, IGNORED) for row, on in zip(rows, counted, strict=True)), IGNORED),
            "chunks": stack((row.chunks for row in rows), -1),
        }
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        slots = torch.arange(length)
        if self.packed:
            batch["position_ids"] = torch.where(
                slots < lengths, stack((row.positions for row in rows), 0), slots - lengths
            )
        else:
            batch["attention_mask"] = (slots < lengths).long()
        return batch


def pack_examples(
    examples: Iterable[Example], max_student_length: int = 2048, max_teacher_length: int = 512, open_rows: int = 16
) -> Iterator[Example]:
    """Join documents into rows that are filled better. Their order changes a little.

    Positions start again with each document, and chunks are counted on. Each document goes to the first of `open_rows`
    rows that has room for it on both sides; if none has, the fullest row is finished.

    Args:
        examples: as encoded, none longer than the maximal lengths.
        max_student_length, max_teacher_length: number of ids a row may have.
        open_rows: number of rows filled at the same time.

    Raises:
        ValueError: an example is longer than a row.
    """
    rows: list[list[Example]] = []

    def lengths(row: Sequence[Example]) -> tuple[int, int]:
        return (
            sum(len(example.student) for example in row),
            sum(len(example.teacher) for example in row if example.teacher is not None),
        )

    for example in examples:
        size, teacher_size = lengths([example])
        if size > max_student_length or teacher_size > max_teacher_length:
            raise ValueError(
                f"An example of {size} student and {teacher_size} teacher ids does not fit a row of "
                f"max_student_length={max_student_length} and max_teacher_length={max_teacher_length}: encode it with "
                "these maximal lengths."
            )
        for row in rows:
            filled, teacher_filled = lengths(row)
            if filled + size <= max_student_length and teacher_filled + teacher_size <= max_teacher_length:
                row.append(example)
                break
        else:
            if len(rows) == open_rows:
                fullest = max(range(open_rows), key=lambda index: lengths(rows[index]))
                yield _join(rows.pop(fullest))
            rows.append([example])
    yield from map(_join, rows)


def _join(row: Sequence[Example]) -> Example:
    students = [example.student for example in row]
    teachers = [example.teacher for example in row if example.teacher is not None]
    counts = [int(student.chunks.max(initial=-1)) + 1 for student in students]
    starts = np.cumsum([0, *counts[:-1]])

    def join(sequences: Sequence[TokenSequence]) -> TokenSequence:
        chunks = [np.where(s.chunks < 0, -1, s.chunks + start) for s, start in zip(sequences, starts, strict=True)]
        return TokenSequence(
            np.concatenate([sequence.ids for sequence in sequences]),
            np.concatenate([sequence.positions for sequence in sequences]),
            np.concatenate([sequence.trained for sequence in sequences]),
            np.concatenate(chunks),
        )

    return Example(join(students), join(teachers) if teachers else None)


__all__ = ["DistillationCollator", "pack_examples"]
