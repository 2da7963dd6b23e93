"""Alignment against brute force on random segmentations, and against the reference's alignments of 16 texts."""

import hashlib
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from byte_llama.distillation import (
    DistillationCollator,
    ParallelEncoder,
    align,
    alignment_matrix,
    chat_format_of,
    space_mask,
)
from byte_llama.distillation.alignment import (
    align_documents,
    closes_before_space,
    closes_unbiased,
    last_tokens,
    merge_chunks,
)
from byte_llama.tokenization_byte_llama import ByteLlamaTokenizer

GOLDENS = Path(__file__).parents[2] / "goldens" / "byte_llama"
PAIRS = [("llama3_1", "llama3_1"), ("gemma2", "gemma2"), ("gemma2", "llama3_1")]


# -- random segmentations ----------------------------------------------------------------------------------------------


@st.composite
def segmentations(draw):
    """Ends of the tokens of two sides of one text: both may be cut short, have empty beginnings and tokens left out."""
    length = draw(st.integers(0, 40))

    def side():
        inner = draw(st.lists(st.integers(0, max(length - 1, 0)), max_size=30))
        repeated = draw(st.booleans())
        ends = sorted(inner if repeated else set(inner)) + [length] * bool(length)
        ends = ends[: draw(st.integers(0, len(ends)))] if draw(st.booleans()) else ends
        for place in draw(st.lists(st.integers(0, len(ends)), max_size=3)):
            ends.insert(place, -1)
        return np.array(ends, dtype=np.int64)

    return side(), side()


def align_by_search(teacher_ends, student_ends):
    """Look through all pairs of tokens for the next place where both sides have come equally far."""
    chunks = [np.full(len(ends), -1) for ends in (teacher_ends, student_ends)]
    done, chunk = [0, 0], 0
    place = 0
    while True:
        found = [
            (i, j)
            for i in range(done[0], len(teacher_ends))
            for j in range(done[1], len(student_ends))
            if teacher_ends[i] == student_ends[j] > place
        ]
        if not found:
            return chunks
        i, j = min(found)
        for side, ends, last in ((0, teacher_ends, i), (1, student_ends, j)):
            for token in range(done[side], last + 1):
                chunks[side][token] = chunk if ends[token] >= 0 else -1
            done[side] = last + 1
        place, chunk = teacher_ends[i], chunk + 1


@given(segmentations())
def test_align_equals_search(ends):
    for chunks, expected in zip(align(*ends), align_by_search(*ends), strict=True):
        np.testing.assert_array_equal(chunks, expected)


@given(st.lists(segmentations(), max_size=5), st.integers(0, 20), st.integers(0, 20))
def test_align_documents_equals_align(documents, most, student_most):
    """Cut documents, too, whose last chunks may lose tokens of either side."""
    ends, place, starts = ([], []), 0, []
    for sides in documents:
        starts.append(place)
        for side, own in zip(ends, sides, strict=True):
            side.append(np.where(own < 0, -1, own + place))
        place += max(own.max(initial=0) for own in sides) + 1
    lengths = [np.array([len(own) for own in side], dtype=np.int64) for side in ends]
    flat = [np.concatenate([np.zeros(0, dtype=np.int64), *side]) for side in ends]
    together = align_documents(*flat, *lengths, np.array(starts, dtype=np.int64), (most, student_most))
    for number, (teacher, student) in enumerate(documents):
        alone = align(teacher[:most], student[:student_most])
        for side, chunks, expected in zip(range(2), together, alone, strict=True):
            start = lengths[side][:number].sum()
            found = chunks[start : start + lengths[side][number]]
            np.testing.assert_array_equal(found[: len(expected)], expected)
            assert (found[len(expected) :] == -1).all()


@given(
    st.binary(max_size=60),
    st.lists(st.integers(0, 60), max_size=40),
    st.lists(st.integers(0, 60), max_size=40),
)
def test_chunks_cover_the_same_bytes_and_are_minimal(text, teacher_cuts, student_cuts):
    sides = []
    for cuts in (teacher_cuts, student_cuts):
        borders = sorted({0, len(text)} | {cut for cut in cuts if cut < len(text)})
        sides.append([text[start:end] for start, end in pairwise(borders)])
    teacher, student = align(*(np.cumsum([len(token) for token in side], dtype=np.int64) for side in sides))
    count = max(teacher.max(initial=-1), student.max(initial=-1)) + 1
    assert (teacher >= 0).all() and (student >= 0).all()
    for chunk in range(count):
        pieces = [
            [token for token, of in zip(tokens, chunks, strict=True) if of == chunk]
            for tokens, chunks in zip(sides, (teacher, student), strict=True)
        ]
        assert b"".join(pieces[0]) == b"".join(pieces[1])
        inner = [set(np.cumsum([len(token) for token in side])[:-1]) for side in pieces]
        assert not inner[0] & inner[1]


@given(segmentations(), st.data())
def test_merging_against_loops(ends, data):
    teacher, student = align(*ends)
    count = len(last_tokens(teacher))
    assert count == len(last_tokens(student)) == teacher.max(initial=-1) + 1
    for chunks in (teacher, student):
        for chunk, last in enumerate(last_tokens(chunks)):
            assert last == max(np.flatnonzero(chunks == chunk))

    flags = [
        np.array(data.draw(st.lists(st.booleans(), min_size=len(c), max_size=len(c))), bool) for c in (teacher, student)
    ]
    before_space = closes_before_space(teacher, student, *flags)
    ids = [
        np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(c), max_size=len(c))), np.int64)
        for c in (teacher, student)
    ]
    biased = np.array(data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1)))
    unbiased = closes_unbiased(teacher, student, *ids, biased)
    for chunk in range(count):
        last = [np.flatnonzero(chunks == chunk)[-1] for chunks in (teacher, student)]
        following = [i + 1 < len(flag) and flag[i + 1] for i, flag in zip(last, flags, strict=True)]
        assert before_space[chunk] == all(following)
        assert unbiased[chunk] == ((ids[0][last[0]], ids[1][last[1]]) not in [tuple(pair) for pair in biased])

    merged, group, groups = merge_chunks(teacher, before_space), 0, []
    for closes in before_space:
        groups.append(group)
        group += closes
    assert merged.tolist() == [groups[chunk] if chunk >= 0 else -1 for chunk in teacher]


def test_alignment_matrix():
    matrix = alignment_matrix(torch.tensor([[0, 0, 2, -1]]), 3)
    assert matrix.int().tolist() == [[[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]]


# -- goldens -----------------------------------------------------------------------------------------------------------


@cache
def golden(teacher, student):
    path = GOLDENS / "alm" / f"align_{teacher}_to_{student}_byte"
    return json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors"))


@cache
def byte_tokenizer(source):
    return ByteLlamaTokenizer.from_pretrained(GOLDENS / "tokenizer" / source)


def documents(examples):
    return [{key: example[key] for key in ("text", "messages") if key in example} for example in examples]


class RecordedTokenizer(PreTrainedTokenizerFast):
    """The teacher's tokenizer, as far as the golden examples show it: texts have the ids recorded for them."""

    def __init__(self, source, examples):
        texts = json.loads((GOLDENS / "tokenizer" / source / "facts.json").read_text())["replacements"]
        self.pieces = {name[3:-3]: tokens for name, tokens in texts.items()}
        vocabulary = {
            token: index
            for example in examples
            for token, index in zip(example["teacher_tokens"], example["teacher_ids"], strict=True)
        }
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=""))
        backend.decoder = decoders.ByteLevel()
        special = [token for token in vocabulary if token.startswith("<") and token.endswith(">") and len(token) > 4]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        bos, eos = self.pieces["bos"][0], self.pieces["eos"][0]
        super().__init__(tokenizer_object=backend, bos_token=bos, eos_token=eos)
        self.recorded = {"a": [vocabulary[bos], -1]}
        form = chat_format_of(self)
        for name, text in form.pieces().items():
            tokens = self.pieces.get(
                {"system": "system_name", "user": "user_name", "assistant": "assistant_name"}.get(name, name)
            )
            self.recorded[text] = [vocabulary.get(token, 0) for token in tokens]
        for example in examples:
            tokens, ids = example["teacher_tokens"], example["teacher_ids"]
            if "text" in example:
                self.recorded[example["text"]] = ids[1:-1]
                continue
            place = 1
            for message in example["messages"]:
                place += sum(
                    len(self.recorded[text])
                    for text in (form.start_header, form.roles[message["role"]], form.end_header)
                )
                end, missing = place, len(message["content"].encode())
                while missing:
                    missing -= len(tokens[end])
                    end += 1
                self.recorded[message["content"]] = ids[place:end]
                place = end + len(self.recorded[form.eot])

    def __call__(self, text, **kwargs):
        if isinstance(text, str):
            ids = self.recorded[text]
            return {"input_ids": ids, "special_tokens_mask": [int(index >= 0) for index in ids]}
        return {"input_ids": [self.recorded[one] for one in text]}


def encoder(teacher, student, **kwargs):
    recorded = RecordedTokenizer(teacher, golden(teacher, student)[0]["examples"])
    return ParallelEncoder(byte_tokenizer(student), recorded, split_special_tokens=False, **kwargs)


def spans(example):
    """Start and end of each chunk, [teacher start, teacher end, student start, student end]."""
    rows = []
    for chunk in range(example.student.chunks.max() + 1):
        tokens = [np.flatnonzero(side.chunks == chunk).tolist() for side in (example.teacher, example.student)]
        assert all(side == list(range(side[0], side[-1] + 1)) for side in tokens)
        rows.append([border for side in tokens for border in (side[0], side[-1] + 1)])
    return rows


def loses_eos(teacher, student, document):
    """Whether the reference leaves the end of a text out, as it takes Llama's `<|eot_id|>` for the end of a turn."""
    return teacher != student and "text" in document


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_golden_alignments(teacher, student):
    examples = golden(teacher, student)[0]["examples"]
    assert len(examples) == 16
    for example, encoded in zip(examples, encoder(teacher, student)(documents(examples)), strict=True):
        expected = example["alignment_indices"]
        sizes = [len(example["teacher_ids"]), len(example["student_ids"])]
        if loses_eos(teacher, student, example):
            expected = [*expected, [sizes[0] - 1, sizes[0], sizes[1] - 1, sizes[1]]]
        assert encoded.teacher.ids.tolist() == example["teacher_ids"]
        assert encoded.student.ids.tolist() == example["student_ids"]
        assert spans(encoded) == expected


@pytest.mark.parametrize("kind", ["unconstrained", "space", "unbiased"])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_golden_batches(teacher, student, kind):
    record, tensors = golden(teacher, student)
    threshold = record["bias_threshold"]
    biased = [pair for *pair, first, second in record["bias_pairs"] if max(first, second) > threshold]
    lengths = {"max_teacher_length": 48, "max_student_length": 176}
    texts = documents(record["examples"])
    examples = encoder(teacher, student, chunk_kind=kind, biased_pairs=np.array(biased), **lengths)(texts)
    teacher_pad = tensors["out.input_ids_original"][0, -1].item()
    batch = DistillationCollator(byte_tokenizer(student).pad_token_id, teacher_pad, 176, 48)(examples)

    for prefix, suffix, matrix in (("", "new", "a"), ("teacher_", "original", "b")):
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(batch[prefix + name], tensors[f"out.{name}_{suffix}"].long())
        labels, mask = batch[prefix + "labels"], tensors[f"out.loss_mask_{suffix}"].bool()
        assert torch.equal((labels != -100)[:, 1:], mask[:, 1:])
        assert torch.equal(labels[:, 1:][mask[:, 1:]], batch[prefix + "input_ids"][:, 1:][mask[:, 1:]])
        dense = alignment_matrix(batch[prefix + "chunks"], 48)
        for row, document in enumerate(texts):
            size = len(examples[row].teacher if prefix else examples[row].student)
            if loses_eos(teacher, student, document) and size < (48 if prefix else 176):
                assert dense[row, size - 1].any()
                dense[row, size - 1] = False
        assert torch.equal(dense, tensors[f"out.alignment_matrix_{matrix}_{kind}"].bool())


def test_golden_loss_mask_of_the_last_turn():
    record, tensors = golden("llama3_1", "llama3_1")
    lengths = {"max_teacher_length": 48, "max_student_length": 176}
    examples = encoder("llama3_1", "llama3_1", train_on="last_turn", **lengths)(documents(record["examples"]))
    batch = DistillationCollator(student_length=176, teacher_length=48)(examples)
    for prefix, suffix in (("", "new"), ("teacher_", "original")):
        mask = tensors[f"out.openmath2.loss_mask_{suffix}"].bool()
        assert torch.equal((batch[prefix + "labels"] != -100)[:, 1:], mask[:, 1:])


# The reference has the names of newline and tab interchanged.
STARTS = {"space": b" ", "tab": b"\n", "newline": b"\t"}


@pytest.mark.parametrize("source", ["llama3_1", "gemma2"])
@pytest.mark.parametrize("mode", ["space+tab+newline+special", "space", "tab", "newline", "special"])
def test_golden_space_masks(source, mode):
    masks = json.loads((GOLDENS / "alm" / "space_masks.json").read_text())["masks"]
    expected = masks[f"{source}/byte/{mode}"]
    tokenizer = byte_tokenizer(source)
    special = [token for token in tokenizer.all_special_tokens if token != "<unk>"] if "special" in mode else []
    starts = tuple(STARTS[part] for part in mode.split("+") if part in STARTS)
    mask = space_mask(tokenizer, special_tokens=special, starts=starts)
    assert mask.nonzero().flatten().tolist() == expected["ids"] and len(mask) == expected["length"]
    assert hashlib.sha256(mask.numpy().astype(np.uint8).tobytes()).hexdigest() == expected["sha256_of_uint8"]
