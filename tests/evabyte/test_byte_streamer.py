"""The streamers hand on exactly the decoded text, in whole characters."""

from itertools import chain
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evabyte.byte_streamer import ByteIteratorStreamer, ByteStreamer
from evabyte.tokenization_evabyte import EvaByteTokenizer

TOKENIZER = EvaByteTokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@st.composite
def splits(draw, ids):
    """The same ids in chunks of any lengths, the empty one included."""
    ids = draw(ids)
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)))))
    return [ids[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def stream(chunks, **arguments):
    texts, ends = [], []
    streamer = ByteStreamer(TOKENIZER, on_text=lambda text, end: (texts.append(text), ends.append(end)), **arguments)
    for chunk in chunks:
        streamer.put(chunk)
    streamer.end()
    assert ends == [False] * (len(ends) - 1) + [True]
    return texts


@given(chunks=splits(TEXT.map(lambda text: TOKENIZER.encode_bytes(text.encode()))))
def test_any_split_of_any_text(chunks):
    text = TOKENIZER.decode_bytes(list(chain.from_iterable(chunks))).decode()
    assert "".join(stream(chunks, errors="strict")) == text
    assert "".join(stream(chunks, errors="replace")) == text


@given(
    chunks=splits(st.lists(st.integers(0, 319))),
    skip_special_tokens=st.booleans(),
    errors=st.sampled_from(["ignore", "replace", "backslashreplace"]),
)
def test_joined_texts_are_decode(chunks, skip_special_tokens, errors):
    arguments = {"skip_special_tokens": skip_special_tokens, "errors": errors}
    assert "".join(stream(chunks, **arguments)) == TOKENIZER.decode(list(chain.from_iterable(chunks)), **arguments)


def test_each_character_comes_at_once():
    ids = TOKENIZER.encode("a é😀", add_special_tokens=False)
    assert stream([[token_id] for token_id in ids]) == ["a", " ", "é", "😀", ""]


def test_special_tokens():
    ids = [1, 161, 11]
    assert stream([ids]) == ["a", ""]
    assert stream([ids], skip_special_tokens=False) == ["<bos>a<|eot_id|>", ""]


def test_unfinished_character():
    assert stream([[161, 290, 194]]) == ["a", ""]
    assert stream([[161, 290, 194]], errors="replace") == ["a", "\ufffd"]


def test_skip_prompt_and_use_again():
    texts = []
    streamer = ByteStreamer(TOKENIZER, skip_prompt=True, on_text=lambda text, end: texts.append(text))
    for _ in range(2):
        streamer.put(torch.tensor([[1, 161, 290]]))
        streamer.put(torch.tensor([162]))
        streamer.end()
    assert texts == ["b", ""] * 2


@pytest.mark.parametrize(
    "value", [torch.tensor([[161, 162]]), torch.tensor([161, 162]), np.array([161, 162]), [161, 162], [[161, 162]]]
)
def test_forms_of_ids(value):
    assert stream([value]) == ["ab", ""]


def test_one_id():
    assert stream([161, torch.tensor(162)]) == ["a", "b", ""]


def test_prints(capsys):
    streamer = ByteStreamer(TOKENIZER)
    streamer.put([161, 259])
    assert capsys.readouterr().out == "a"
    streamer.put([233])
    streamer.end()
    assert capsys.readouterr().out == "é\n"


def test_iterator():
    streamer = ByteIteratorStreamer(TOKENIZER, timeout=5, skip_prompt=True)

    def generate():
        for value in (torch.tensor([[1, 161]]), torch.tensor([259]), torch.tensor([233]), torch.tensor([2])):
            streamer.put(value)
        streamer.end()

    thread = Thread(target=generate)
    thread.start()
    assert list(streamer) == ["é", ""]
    thread.join()


def test_bad_input():
    streamer = ByteStreamer(TOKENIZER)
    with pytest.raises(ValueError, match="value has 2 rows: generate with batch size 1"):
        streamer.put(torch.tensor([[161], [162]]))
    with pytest.raises(ValueError, match="token id 320 is not in the vocabulary"):
        streamer.put([320])
    with pytest.raises(ValueError, match="errors='loud' is not known"):
        ByteStreamer(TOKENIZER, errors="loud")
