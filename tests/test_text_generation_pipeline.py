"""`pipeline("text-generation")` with our models: what `generate` says, for texts and chats, one or many."""

import pytest
import torch
from compatibility import MODELS
from speller import SPELLED, speller, tokenizer_of
from transformers import TextIteratorStreamer, pipeline

CHAT = [{"role": "user", "content": "漢?"}]
CELLS = [
    pytest.param(name, marks=pytest.mark.compatibility("pipeline text-generation", name), id=name) for name in MODELS
]


@pytest.fixture(scope="module", params=MODELS)
def generator(request):
    return pipeline("text-generation", speller(request.param), tokenizer=tokenizer_of(request.param), device="cpu")


@pytest.mark.parametrize("name", CELLS)
def test_from_a_folder(name, tmp_path):
    model, tokenizer = speller(name), tokenizer_of(name)
    model.generation_config.multibyte = True
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", str(tmp_path), dtype=torch.float32, device="cpu")
    assert generator("né a")[0]["generated_text"] == "né a" + SPELLED["a"]
    assert generator(CHAT)[0]["generated_text"] == [*CHAT, {"role": "assistant", "content": SPELLED["a"]}]


def test_batches(generator):
    texts = ["c", "the longest of them, a", "né c", "b"]
    expected = [SPELLED["c"], SPELLED["a"], SPELLED["c"], "xyz" * 4]
    for batch_size in (1, 3):
        how = {"batch_size": batch_size, "max_new_tokens": 12, "return_full_text": False}
        assert [answer[0]["generated_text"] for answer in generator(texts, **how)] == expected
        chats = generator([CHAT, [*CHAT, {"role": "assistant", "content": "x"}, *CHAT]], **how)
        assert [chat[0]["generated_text"] for chat in chats] == [SPELLED["a"]] * 2
    whole = generator(texts, batch_size=4, max_new_tokens=12)
    assert [answer[0]["generated_text"] for answer in whole] == [t + e for t, e in zip(texts, expected, strict=True)]


@pytest.mark.parametrize("multibyte", [False, True])
def test_streaming(generator, multibyte):
    streamer = TextIteratorStreamer(generator.tokenizer, skip_prompt=True, skip_special_tokens=True)
    generator(CHAT, streamer=streamer, multibyte=multibyte)
    assert "".join(streamer) == SPELLED["a"]


def test_sampling(generator):
    how = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 12, "num_return_sequences": 3}
    torch.manual_seed(0)
    answers = [answer["generated_text"] for answer in generator("b", **how)]
    torch.manual_seed(0)
    ids = generator.model.generate(**generator.tokenizer("b", return_tensors="pt"), **how)
    assert answers == generator.tokenizer.batch_decode(ids, skip_special_tokens=True)
