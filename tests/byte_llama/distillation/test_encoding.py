"""From documents to aligned token sequences, with tokenizers that spell texts and with those that rewrite them."""

import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import example as such_as
from hypothesis import given, settings
from hypothesis import strategies as st
from small_documents import (
    ANSWER,
    CONTENT,
    DOCUMENTS,
    PROMPT,
    SPECIAL,
    byte_tokenizer,
    rendered,
    sentencepiece_tokenizer,
    spelled,
    subword_tokenizer,
)

from byte_llama.distillation import CHATML_FORMAT, LLAMA3_FORMAT, ParallelEncoder, chat_format_of, space_mask
from byte_llama.token_bytes import token_bytes
from byte_llama.tokenization_byte_llama import byte_tokenizer_from


@given(st.lists(DOCUMENTS, max_size=3), st.booleans(), st.sampled_from([(), ("user", "\n\n")]))
def test_chunks_of_documents(documents, split, template_words):
    """Both sides spell the document; chunks cover the same bytes, are minimal, and never part a piece."""
    student, teacher = byte_tokenizer(template_words), subword_tokenizer()
    examples = ParallelEncoder(student, teacher, split_special_tokens=split)(documents)
    assert len(examples) == len(documents)
    for document, example in zip(documents, examples, strict=True):
        text = rendered(document).encode()
        sides = [(spelled(teacher, example.teacher.ids), example.teacher.chunks)]
        sides.append((spelled(student, example.student.ids), example.student.chunks))
        assert all(b"".join(tokens) == text and (chunks >= 0).all() for tokens, chunks in sides)
        assert example.student.trained.all() and example.student.positions.tolist() == list(range(len(example.student)))
        special = token_bytes(student)
        for chunk in range(example.student.chunks.max() + 1):
            own = [[tokens[i] for i in np.flatnonzero(chunks == chunk)] for tokens, chunks in sides]
            assert b"".join(own[0]) == b"".join(own[1])
            inner = [set(np.cumsum([len(token) for token in side])[:-1].tolist()) for side in own]
            of_piece = any(special[i] is None for i in example.student.ids[example.student.chunks == chunk])
            assert not inner[0] & inner[1] or of_piece or b"".join(own[0]) in (b"system", b"user", b"assistant")
        if split:
            inside = sum(m["content"].count("<|im_end|>") for m in document.get("messages", []))
            ends = (example.student.ids == student.convert_tokens_to_ids("<|im_end|>")).sum()
            assert ends == len(document.get("messages", [])) and rendered(document).count("<|im_end|>") >= ends + inside


@given(CONTENT)
@such_as("\u0958 " + "e\u0301" * 3)  # as long as before
@such_as("x\u0323\u0336 t")  # accents change places
@such_as("\u1112\u1161\u11ab t")  # letters that are joined
def test_texts_that_the_tokenizer_normalizes(text):
    teacher, student = subword_tokenizer("NFC"), byte_tokenizer()
    (example,) = ParallelEncoder(student, teacher)([{"text": text}])
    tokens = [spelled(teacher, example.teacher.ids), spelled(student, example.student.ids)]
    assert b"".join(tokens[1]) == rendered({"text": text}).encode()
    assert (example.teacher.chunks >= 0).all() and (example.student.chunks >= 0).all()
    for chunk in range(example.student.chunks.max() + 1):
        of = [
            b"".join(tokens[side][i] for i in np.flatnonzero(chunks == chunk))
            for side, chunks in enumerate((example.teacher.chunks, example.student.chunks))
        ]
        if of[0] != of[1]:  # characters as they were are kept apart, where normalization does not join them
            assert unicodedata.normalize("NFC", of[1].decode()).encode() == of[0]


@given(CONTENT)
def test_a_space_put_in_front_belongs_to_no_text(text):
    teacher, student = sentencepiece_tokenizer(), byte_tokenizer()
    (example,) = ParallelEncoder(student, teacher)([{"text": text}])
    tokens = [spelled(teacher, example.teacher.ids), spelled(student, example.student.ids)]
    for chunk in range(example.student.chunks.max() + 1):
        of = [
            b"".join(tokens[side][i] for i in np.flatnonzero(chunks == chunk))
            for side, chunks in enumerate((example.teacher.chunks, example.student.chunks))
        ]
        assert of[0] == of[1] or (chunk == 0 and of[0] == b" " + of[1])
    # This teacher puts nothing in front of a text: the student's beginning has no counterpart.
    assert example.student.chunks[0] == -1 and (example.student.chunks[1:] >= 0).all()


@settings(max_examples=30)
@given(DOCUMENTS, st.integers(1, 30), st.integers(1, 60))
def test_cut_sequences(document, teacher_length, student_length):
    """Cutting leaves the beginning of what there was, and those chunks that are whole on both sides."""
    student, teacher = byte_tokenizer(), subword_tokenizer()
    (whole,) = ParallelEncoder(student, teacher)([document])
    lengths = {"max_teacher_length": teacher_length, "max_student_length": student_length}
    (cut,) = ParallelEncoder(student, teacher, **lengths)([document])
    for side, most in (("teacher", teacher_length), ("student", student_length)):
        short, long = getattr(cut, side), getattr(whole, side)
        for name in ("ids", "trained", "positions"):
            np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[:most])
    kept = [
        chunk
        for chunk in range(whole.student.chunks.max() + 1)
        if np.flatnonzero(whole.student.chunks == chunk)[-1] < student_length
        and np.flatnonzero(whole.teacher.chunks == chunk)[-1] < teacher_length
    ]
    for side, most in (("teacher", teacher_length), ("student", student_length)):
        chunks = getattr(whole, side).chunks[:most]
        np.testing.assert_array_equal(getattr(cut, side).chunks, np.where(np.isin(chunks, kept), chunks, -1))


def test_very_long_texts_are_cut_first():
    text = "the quick fox " * 2000
    encoder = ParallelEncoder(byte_tokenizer(), subword_tokenizer(), max_student_length=100, max_teacher_length=30)
    (example,) = encoder([{"text": text}])
    assert len(example.student) == 100 and byte_tokenizer().decode_bytes(example.student.ids) == text.encode()[:99]
    (chat,) = encoder([{"messages": [{"role": "user", "content": text}, ANSWER]}])
    assert len(chat.student) == 100 and len(chat.teacher) == 30


@pytest.mark.parametrize(
    ("train_on", "messages", "expected"),
    [
        (
            "all",
            [PROMPT, ANSWER],
            rendered({"messages": [PROMPT, ANSWER]}),
        ),
        ("completions", [PROMPT, ANSWER, PROMPT, ANSWER], "It jumps over the dog.\n<|im_end|>\n" * 2),
        ("completions", [PROMPT], ""),
        ("last_turn", [PROMPT, ANSWER, PROMPT, ANSWER], "It jumps over the dog.\n<|im_end|>\n"),
        (
            "last_turn",
            [ANSWER, PROMPT],
            "It jumps over the dog.\n<|im_end|>\n<|im_start|>user\nWhat is the quick fox?<|im_end|>\n",
        ),
        ("last_turn", [PROMPT], "<s><|im_start|>user\nWhat is the quick fox?<|im_end|>\n"),
    ],
)
def test_what_is_trained(train_on, messages, expected):
    encoder = ParallelEncoder(byte_tokenizer(), subword_tokenizer(), train_on=train_on)
    chat, plain = encoder([{"messages": messages}, {"text": "A text."}])
    for tokenizer, side, text in (
        (byte_tokenizer(), chat.student, plain.student),
        (subword_tokenizer(), chat.teacher, plain.teacher),
    ):
        assert b"".join(spelled(tokenizer, side.ids[side.trained])).decode() == expected
        assert text.trained.all()


def test_formats_may_differ():
    """Pieces of one name are aligned, whatever they are on each side."""
    teacher = subword_tokenizer()
    student = byte_tokenizer_from(teacher, special_tokens=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    assert chat_format_of(student) is LLAMA3_FORMAT and chat_format_of(teacher) is CHATML_FORMAT
    (example,) = ParallelEncoder(student, teacher)([{"messages": [PROMPT, ANSWER]}])
    pairs = []
    for chunk in range(example.student.chunks.max() + 1):
        sides = ((teacher, example.teacher), (student, example.student))
        pairs.append(
            [b"".join(spelled(tokenizer, side.ids[side.chunks == chunk])).decode() for tokenizer, side in sides]
        )
    assert pairs[:4] == [
        ["<s>", "<s>"],
        ["<|im_start|>", "<|start_header_id|>"],
        ["user", "user"],
        ["\n", "<|end_header_id|>\n\n"],
    ]
    assert pairs[-1] == ["<|im_end|>\n", "<|eot_id|>"]
    assert "".join(pair[0] for pair in pairs[4:]).startswith(PROMPT["content"])


def test_without_a_teacher():
    with_teacher = ParallelEncoder(byte_tokenizer(), subword_tokenizer())([{"text": "A text."}])[0]
    (alone,) = ParallelEncoder(byte_tokenizer())([{"text": "A text.", "messages": None}])
    assert alone.teacher is None and (alone.student.chunks == -1).all()
    np.testing.assert_array_equal(alone.student.ids, with_teacher.student.ids)


def test_encoder_errors():
    encoder = ParallelEncoder(byte_tokenizer(), subword_tokenizer())
    for document, message in [
        ({"content": "x"}, "must have a"),
        ({"text": None}, "must have a"),
        ({"text": "\ud800"}, "lone surrogate"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content of type list"),
    ]:
        with pytest.raises(ValueError, match=message):
            encoder([document])
    for options, message in [
        ({"train_on": "prompts"}, "train_on must be one of 'all'"),
        ({"chunk_kind": "words"}, "chunk_kind must be one of"),
        ({"chunk_kind": "unbiased"}, "biased_pairs"),
    ]:
        with pytest.raises(ValueError, match=message):
            ParallelEncoder(byte_tokenizer(), subword_tokenizer(), **options)
    plain = byte_tokenizer_from(subword_tokenizer())
    with pytest.raises(ValueError, match="student_format must be given"):
        ParallelEncoder(plain, subword_tokenizer())([{"messages": [PROMPT]}])
    with pytest.raises(ValueError, match="teacher_format must be given"):
        ParallelEncoder(byte_tokenizer(), plain)([{"messages": [PROMPT]}])


def test_space_mask():
    tokenizer = subword_tokenizer()
    tokens = {token: index for token, index in tokenizer.get_vocab().items()}
    mask = space_mask(tokenizer)
    for token, index in tokens.items():
        assert mask[index] == (token in SPECIAL or token[0] in "ĠĊĉ")
    assert space_mask(tokenizer, special_tokens=["<s>"]).sum() == mask.sum() - 3
    assert torch.equal(space_mask(tokenizer, vocab_size=len(mask) + 7), torch.cat((mask, torch.zeros(7) > 0)))
    with pytest.raises(ValueError, match="vocab_size"):
        space_mask(tokenizer, vocab_size=3)
    with pytest.raises(ValueError, match="<bos>"):
        space_mask(tokenizer, special_tokens=["<bos>"])
