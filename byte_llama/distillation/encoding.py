"""Documents, plain or chats, as token sequences of the student and, aligned with them, of the teacher."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from .alignment import Bools, Ints, align_documents, closes_before_space, closes_unbiased, last_tokens, merge_chunks
from .chat_format import ChatFormat, chat_format_of
from .spelling import Spelling

ChunkKind = Literal["unconstrained", "space", "unbiased"]
TrainOn = Literal["all", "completions", "last_turn"]

_MOST_CHARACTERS_PER_ID = 16  # longer texts are cut before they are tokenised, as no more of them can be used


@dataclass(frozen=True)
class TokenSequence:
    """One row of one side: a document, or several packed ones.

    Attributes:
        ids: int64 [T].
        positions: int64 [T], counted from 0 in each document.
        trained: bool [T], which tokens losses count. Never the first of a packed document: nothing predicts it.
        chunks: int64 [T], the chunk of each token; -1 for none, and without a teacher.
    """

    ids: Ints
    positions: Ints
    trained: Bools
    chunks: Ints

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Example:
    """The two tokenisations of one row; the teacher's is None where there is no teacher."""

    student: TokenSequence
    teacher: TokenSequence | None = None


class _Segment(NamedTuple):
    """A part of a document: text, or where `text` is None the piece of the chat format called `piece`."""

    trained: bool
    piece: str = ""
    text: str | None = None
    size: int = 0  # of the text, in bytes


@dataclass(frozen=True)
class _Piece:
    """Ids [T] of a piece, where its parts end [T], one place for each part that both sides have, and their number."""

    ids: Ints
    ends: Ints
    size: int


@dataclass(frozen=True)
class _Tokens:
    """Tokens of documents one after the other: ids, ends, which are of pieces, which are trained [T].

    Of each document: number of tokens, and the place where it starts [D].
    """

    ids: Ints
    ends: Ints
    of_piece: Bools
    trained: Bools
    lengths: Ints
    starts: Ints


class _Side:
    """One tokenizer, and the pieces that it puts around texts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat | None, split_special_tokens: bool
    ) -> None:
        self.spelling = Spelling(tokenizer, split_special_tokens)
        self.roles = dict(chat_format.roles) if chat_format else {}
        framed = tokenizer("a", return_special_tokens_mask=True)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.parts: dict[str, list[int]] = {
            "before": framed["input_ids"][: framed["special_tokens_mask"].index(0)],
            "eos": end,
        }
        if chat_format:
            for name, text in chat_format.pieces().items():
                options = {"add_special_tokens": False, "split_special_tokens": False}
                self.parts[name] = tokenizer(text, **options)["input_ids"]
        self.special = self.spelling.special.copy()
        self.special[[ids[0] for ids in self.parts.values() if len(ids) == 1]] = True
        self.pieces: dict[str, _Piece] = {}

    def make_pieces(self, other: "_Side | None") -> None:
        """Prepare the pieces, given the side to align with."""
        pieces: dict[str, tuple[str, ...]] = {name: (name,) for name in self.parts}
        pieces.update({f"header of {role}": ("start_header", role, "end_header") for role in self.roles})
        for name, parts in pieces.items():
            ids: list[int] = []
            ends: list[int] = []
            size = 0
            for part in parts:
                part_ids = self.parts[part]
                shared = other is None or bool(other.parts.get(part))
                if part_ids and shared:
                    ends += [size] * (len(part_ids) - 1) + [size + 1]
                    size += 1
                else:
                    ends += [-1] * len(part_ids)
                ids += part_ids
            self.pieces[name] = _Piece(np.array(ids, np.int64), np.array(ends, np.int64), size)

    def assemble(self, segments: Sequence[_Segment], counts: Sequence[int]) -> _Tokens:
        """Tokens of documents, given the segments of all and how many each has."""
        texts = iter(self.spelling.encode([segment.text for segment in segments if segment.text is not None]))
        ids, ends, sizes = [], [], []
        for segment in segments:
            if segment.text is None:
                piece = self.pieces[segment.piece]
                ids.append(piece.ids)
                ends.append(piece.ends)
                sizes.append(piece.size)
            else:
                segment_ids, segment_ends = next(texts)
                ids.append(segment_ids)
                ends.append(segment_ends)
                sizes.append(segment.size)
        lengths = np.array([len(segment_ids) for segment_ids in ids], dtype=np.int64)
        # One place is left free between documents, for what is empty at the start of the next.
        first_segments = np.cumsum(counts, dtype=np.int64) - counts
        gaps = np.zeros(len(sizes), dtype=np.int64)
        gaps[first_segments] = 1
        places = np.cumsum(gaps) + np.cumsum(sizes) - sizes
        own_ends = np.concatenate(ends)
        return _Tokens(
            np.concatenate(ids),
            np.where(own_ends < 0, -1, own_ends + np.repeat(places, lengths)),
            np.repeat([segment.text is None for segment in segments], lengths),
            np.repeat([segment.trained for segment in segments], lengths),
            np.add.reduceat(lengths, first_segments),
            places[first_segments],
        )


class ParallelEncoder:
    """Encodes documents with the tokenizers of student and teacher, and aligns the two.

    A document is a dict with a `"text"`, or with `"messages"`, each of which has a `"role"` and a `"content"`. A plain
    text stands between the beginning that its tokenizer puts in front of any text and the `eos_token`; a chat follows
    the same beginning, written as its `ChatFormat` says. Texts and contents are tokenised on their own.

    Args:
        student_tokenizer: backed by the `tokenizers` library, as is the teacher's.
        teacher_tokenizer: None for training without a teacher.
        max_student_length, max_teacher_length: number of ids at which sequences are cut.
        student_format, teacher_format: how chats are written. Default: the known format of the tokenizer, if any.
        train_on: the tokens that losses count: `"all"`; `"completions"`, what assistants say, with its end;
            `"last_turn"`, all from what the assistant says last. Plain texts count whole.
        chunk_kind: what ends a chunk. `"unconstrained"`: tokens of both sides that end at the same place. `"space"`:
            those of them before a space, or at a special token or piece of the chat format. `"unbiased"`: those of
            them that are no biased pair, or are at a special token or piece.
        biased_pairs: int64 [P, 2] for chunks of kind `"unbiased"` (see `closes_unbiased`).
        split_special_tokens: whether special strings inside texts are spelled out, as is safe, or become special ids.

    Raises:
        TypeError: a tokenizer has no Rust backend.
        ValueError: an option has no such value, `biased_pairs` is missing, or the tokens of a tokenizer do not say
            which bytes they are. From a call, that a document has neither text nor messages, or is a chat that the
            format cannot write.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_student_length: int = 2048,
        max_teacher_length: int = 512,
        student_format: ChatFormat | None = None,
        teacher_format: ChatFormat | None = None,
        train_on: TrainOn = "all",
        chunk_kind: ChunkKind = "unconstrained",
        biased_pairs: Ints | None = None,
        split_special_tokens: bool = True,
    ) -> None:
        for name, value, choices in (
            ("train_on", train_on, get_args(TrainOn)),
            ("chunk_kind", chunk_kind, get_args(ChunkKind)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but is {value!r}.")
        if chunk_kind == "unbiased" and biased_pairs is None:
            raise ValueError('biased_pairs must be given for chunk_kind="unbiased": pass int64 [P, 2].')
        self.max_student_length, self.max_teacher_length = max_student_length, max_teacher_length
        self.train_on, self.chunk_kind = train_on, chunk_kind
        self.biased_pairs = biased_pairs if chunk_kind == "unbiased" else None
        form = student_format or chat_format_of(student_tokenizer)
        self._student = _Side(student_tokenizer, form, split_special_tokens)
        self._teacher: _Side | None = None
        if teacher_tokenizer is not None:
            form = teacher_format or chat_format_of(teacher_tokenizer)
            self._teacher = _Side(teacher_tokenizer, form, split_special_tokens)
            self._teacher.make_pieces(self._student)
        self._student.make_pieces(self._teacher)

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Encode documents; many at a time are encoded on all cores."""
        if not documents:
            return []
        cut = [self._segments(document) for document in documents]
        segments, counts = list(chain.from_iterable(cut)), [len(part) for part in cut]
        most, teacher_most = self.max_student_length, self.max_teacher_length
        student = self._student.assemble(segments, counts)
        if self._teacher is None:
            none = np.full(len(student.ids), -1)
            return [Example(row) for row, _ in _split(student, none, most)]
        teacher = self._teacher.assemble(segments, counts)
        teacher_chunks, chunks = align_documents(
            teacher.ends, student.ends, teacher.lengths, student.lengths, student.starts, (teacher_most, most)
        )
        rows = zip(_split(student, chunks, most), _split(teacher, teacher_chunks, teacher_most), strict=True)
        if self.chunk_kind == "unconstrained":
            return [Example(row, teacher_row) for (row, _), (teacher_row, _) in rows]
        return [self._merge(self._teacher, *side, *teacher_side) for side, teacher_side in rows]

    def _segments(self, document: Mapping[str, Any]) -> list[_Segment]:
        if document.get("messages") is not None:
            segments = self._chat_segments(document["messages"])
        elif isinstance(document.get("text"), str):
            segments = [_Segment(True, "before"), _Segment(True, text=document["text"]), _Segment(True, "eos")]
        else:
            raise ValueError(
                f'A document must have a "text", which is a string, or "messages", but this one has {list(document)}.'
            )
        left = _MOST_CHARACTERS_PER_ID * self.max_student_length
        cut = []
        for segment in segments:
            if segment.text is not None:
                text = segment.text[:left]
                cut.append(_Segment(segment.trained, text=text, size=_size(text)))
                left -= len(segment.text)
            else:
                cut.append(segment)
            if left < 0:
                break
        return cut

    def _chat_segments(self, messages: Sequence[Mapping[str, Any]]) -> list[_Segment]:
        sides = [side for side in (self._student, self._teacher) if side]
        for side, name in zip(sides, ("student_format", "teacher_format"), strict=False):
            if not side.roles:
                raise ValueError(f"{name} must be given, as the format of chats is not known for this tokenizer.")
        said = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        first = said[-1] if said else 0
        segments = [_Segment(self.train_on == "all" or (self.train_on == "last_turn" and not said), "before")]
        for index, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if any(role not in side.roles for side in sides) or not isinstance(content, str):
                raise ValueError(
                    f"The messages of a chat must have a role, one of {sorted(sides[0].roles)}, and a string as their "
                    f"content, but one has the role {role!r} and a content of type {type(content).__name__}."
                )
            header = content_trained = True
            if self.train_on == "completions":
                header, content_trained = False, role == "assistant"
            elif self.train_on == "last_turn":
                header, content_trained = index > first or not said, index >= first
            segments.append(_Segment(header, f"header of {role}"))
            segments.append(_Segment(content_trained, text=content))
            segments.append(_Segment(content_trained, "eot"))
        return segments

    def _merge(
        self, teacher: _Side, row: TokenSequence, of_piece: Bools, teacher_row: TokenSequence, teacher_of_piece: Bools
    ) -> Example:
        """The example of two rows, with chunks of this encoder's kind, given which tokens are of pieces."""
        chunks, teacher_chunks = row.chunks, teacher_row.chunks
        if self.biased_pairs is None:
            spaces = self._student.spelling.starts_with_space[row.ids]
            teacher_spaces = teacher.spelling.starts_with_space[teacher_row.ids]
            closes = closes_before_space(teacher_chunks, chunks, teacher_spaces, spaces)
        else:
            closes = closes_unbiased(teacher_chunks, chunks, teacher_row.ids, row.ids, self.biased_pairs)
        special = self._student.special[row.ids] | of_piece
        teacher_special = teacher.special[teacher_row.ids] | teacher_of_piece
        closes |= special[last_tokens(chunks)] & teacher_special[last_tokens(teacher_chunks)]
        return Example(
            replace(row, chunks=merge_chunks(chunks, closes)),
            replace(teacher_row, chunks=merge_chunks(teacher_chunks, closes)),
        )


def _size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            "A document holds a lone surrogate, which has no UTF-8 form: clean it with "
            'text.encode("utf-8", "replace").decode().'
        ) from error


def _split(tokens: _Tokens, chunks: Ints, most: int) -> Iterator[tuple[TokenSequence, Bools]]:
    """Row of each document, cut to at most `most` tokens, and which of them are of pieces."""
    starts = np.cumsum(tokens.lengths) - tokens.lengths
    positions = np.arange(tokens.lengths.max(initial=0))
    for start, length in zip(starts.tolist(), tokens.lengths.tolist(), strict=True):
        part = slice(start, start + min(length, most))
        row = TokenSequence(tokens.ids[part], positions[: part.stop - start], tokens.trained[part], chunks[part])
        yield row, tokens.of_piece[part]


__all__ = ["ChunkKind", "Example", "ParallelEncoder", "TokenSequence", "TrainOn"]
