"""Bits per byte are those of the model's own distribution, one id at a time; `evabyte bpb` prints them."""

import copy
import json
import math

import pytest
import torch
from compatibility import MODELS
from evaluated_models import evaluated_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from evabyte.bits_per_byte import bits_of_ids, bits_per_byte, default_context, text_ids
from evabyte.cli import main

TEXT = "The quick brown fox, naïve: 42 €!\n\nthe user 😀".encode()
NOT_UTF8 = b"\xff\xfe caf\xc3"
ROW = "Bits per byte (evabyte bpb)"
EVERY_KIND = [*MODELS, "subword Llama", "subword Gemma 2"]


@torch.no_grad()
def bits_one_by_one(model, ids, first, context, stride):
    """Each id's bits from a forward of its own over what its window has before it."""
    bits = 0.0
    before = [] if first is None else [first]
    room = context + 1 - len(before)  # ids of a window, its last one only predicted
    for place in range(1 - len(before), len(ids)):
        begin = max(math.ceil((place + 1 - room) / stride), 0) * stride
        logits = model(torch.tensor([[*before, *ids[begin:place]]])).logits[0, -1]
        bits -= logits.log_softmax(-1)[ids[place]].item() / math.log(2)
    return bits


@settings(max_examples=15)
@given(
    name=st.sampled_from(EVERY_KIND),
    count=st.integers(0, 40),
    context=st.integers(1, 45),
    share=st.floats(0.01, 1),
    batch_size=st.integers(1, 4),
    with_first=st.booleans(),
)
def test_every_id_once_with_its_windows_text_before_it(name, count, context, share, batch_size, with_first):
    model, tokenizer = evaluated_model(name)
    ids = text_ids(tokenizer, TEXT)[0][:count]
    first = tokenizer.bos_token_id if with_first else None
    stride = math.ceil(share * context)
    expected = bits_one_by_one(model, ids, first, context, stride)
    assert bits_of_ids(model, ids, first, context, stride, batch_size) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_texts_long_short_and_empty(name):
    model, tokenizer = evaluated_model(name)
    for text, context in ((TEXT, 16), (TEXT, 512), (b"a", 16), (b"", 16)):
        score = bits_per_byte(model, tokenizer, text, context)
        ids = tokenizer(text.decode(), add_special_tokens=False)["input_ids"]
        expected = bits_one_by_one(model, ids, tokenizer.bos_token_id, context, context // 2)
        assert score.bits == pytest.approx(expected, rel=1e-5)
        assert (score.bytes, score.ids, score.lossless) == (len(text), len(ids), True)
        assert score.bits_per_byte == (score.bits / len(text) if text else None)


def test_special_strings_are_text():
    for name in EVERY_KIND:
        _, tokenizer = evaluated_model(name)
        ids, lossless = text_ids(tokenizer, f"end{tokenizer.eos_token}".encode())
        assert tokenizer.eos_token_id not in ids and lossless


def test_bytes_that_are_not_utf8():
    model, tokenizer = evaluated_model("EvaByte")
    score = bits_per_byte(model, tokenizer, NOT_UTF8, context=4)
    ids = [64 + byte for byte in NOT_UTF8]
    assert score.bits == pytest.approx(bits_one_by_one(model, ids, tokenizer.bos_token_id, 4, 2), rel=1e-5)
    assert (score.bytes, score.lossless) == (len(NOT_UTF8), True)
    with pytest.raises(ValueError, match="`data` is not UTF-8 from byte 0 on"):
        bits_per_byte(*evaluated_model("subword Llama"), NOT_UTF8)


@pytest.fixture
def lossy():
    """A tokenizer that forgets capital letters, and names no beginning."""
    backend = copy.deepcopy(evaluated_model("subword Llama")[1].backend_tokenizer)
    backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def test_a_tokenizer_that_loses_something(lossy):
    model, _ = evaluated_model("subword Llama")
    assert bits_per_byte(model, lossy, b"lower").lossless
    assert not bits_per_byte(model, lossy, b"Upper").lossless
    # With no bos the text begins after eos; with neither there is nothing to score the first id from.
    ids = lossy("lower")["input_ids"][1:]
    assert bits_per_byte(model, lossy, b"lower").bits == pytest.approx(
        bits_one_by_one(model, ids, lossy.eos_token_id, 256, 128), rel=1e-5
    )
    lossy.eos_token = None
    with pytest.raises(ValueError, match="neither a bos nor an eos"):
        bits_per_byte(model, lossy, b"lower")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "`context` and `batch_size` must be at least 1"),
        ({"batch_size": 0}, "`context` and `batch_size` must be at least 1"),
        ({"context": 8, "stride": 9}, "`stride` must be from 1 to `context`"),
        ({"stride": 0}, "`stride` must be from 1 to `context`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bits_per_byte(*evaluated_model("EvaByte"), b"text", **arguments)


def test_nothing_but_what_is_scored_meets_the_vocabulary(monkeypatch):
    """Logits are asked for at the scored ids alone, and turned into float32 a piece at a time."""
    model, tokenizer = evaluated_model("subword Llama")
    expected = bits_per_byte(model, tokenizer, TEXT, context=16)
    asked = []
    predict = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda states: asked.append(states.shape[1]) or predict(states))
    monkeypatch.setattr("evabyte.bits_per_byte.LOGITS_AT_ONCE", 3 * model.config.vocab_size)
    score = bits_per_byte(model, tokenizer, TEXT, context=16)
    assert score.bits == pytest.approx(expected.bits, rel=1e-6)
    assert asked == [16, 8, score.ids - 24]


def test_the_default_context():
    assert default_context(evaluated_model("EvaByte")[0].config) == 512
    assert default_context(LlamaConfig(max_position_embeddings=131072)) == 4096


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.compatibility(ROW, n)) for n in MODELS])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = evaluated_model(request.param)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return request.param, str(folder)


def test_command(saved, tmp_path, capsys):
    name, folder = saved
    model, tokenizer = evaluated_model(name)
    texts = {"text": TEXT, "bytes": NOT_UTF8, "empty": b""}
    for file, data in texts.items():
        (tmp_path / file).write_bytes(data)
    files = [str(tmp_path / file) for file in texts]
    options = ["--context", "16", "--stride", "5", "--batch-size", "2"]
    assert main(["bpb", folder, *files, *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    total = 0.0
    for entry, file, data in zip(result["files"], files, texts.values(), strict=True):
        score = bits_per_byte(model, tokenizer, data, 16, 5)
        total += score.bits
        assert entry["file"] == file and entry["lossless"]
        assert entry["bits"] == pytest.approx(score.bits, rel=1e-5)
        assert entry["bytes"] == entry["ids"] == len(data)
    assert result["total"]["bits_per_byte"] == pytest.approx(total / sum(map(len, texts.values())), rel=1e-5)
    assert (result["context"], result["stride"], result["dtype"]) == (16, 5, "float32")
    assert main(["bpb", folder, *files, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [f"{result['files'][0]['bits_per_byte']:.4f}", "51", "1.00", files[0]]
    assert lines[3].split() == ["-", "0", "-", files[2]]
    assert lines[4].split()[0] == f"{result['total']['bits_per_byte']:.4f}" and lines[5].endswith(" bytes/s")


def test_command_with_a_subword_model(tmp_path, lossy, capsys):
    evaluated_model("subword Llama")[0].save_pretrained(tmp_path)
    lossy.save_pretrained(tmp_path)
    (tmp_path / "text").write_bytes(b"Upper")
    (tmp_path / "bytes").write_bytes(NOT_UTF8)
    assert main(["bpb", str(tmp_path), str(tmp_path / "text")]) == 0
    assert "does not give this text back exactly" in capsys.readouterr().err
    assert main(["bpb", str(tmp_path), str(tmp_path / "bytes")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"evabyte bpb: {tmp_path / 'bytes'}: `data` is not UTF-8") and message.count("\n") == 1
    assert main(["bpb", str(tmp_path), str(tmp_path / "absent")]) == 2
    assert "absent: No such file" in capsys.readouterr().err
