"""Reading documents, and streams of encoded examples."""

import json
import sys
import types
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_documents import ANSWER, PROMPT, byte_tokenizer, subword_tokenizer
from torch.utils.data import DataLoader

from byte_llama.distillation import (
    DistillationCollator,
    DistillationDataset,
    ParallelEncoder,
    hub_documents,
    read_documents,
)
from byte_llama.distillation.data import cut_lines, shuffled

# -- reading -----------------------------------------------------------------------------------------------------------


@given(st.text(st.sampled_from("ab é😀\n\r"), max_size=60), st.integers(4, 20))
def test_cut_lines(text, max_bytes):
    parts = list(cut_lines(text.splitlines(keepends=True), max_bytes))
    assert "".join(parts) == text and all(0 < len(part.encode()) <= max_bytes for part in parts)
    for part, following in pairwise(parts):
        line = following.splitlines(keepends=True)[0].encode()
        full = len(part.encode()) + len(line) > max_bytes or len(line) > max_bytes
        assert part[-1] in "\n\r " or (full and len(part.encode()) > max_bytes - 4)
    assert list(cut_lines(text.splitlines(keepends=True), None)) == [text]


def test_long_lines_are_cut_behind_spaces():
    assert list(cut_lines(["one two three\n", "four\n"], 9)) == ["one two ", "three\n", "four\n"]


def test_cut_lines_needs_room_for_a_character():
    with pytest.raises(ValueError, match="max_bytes must be at least 4"):
        list(cut_lines(["x"], 3))


def test_read_documents(tmp_path):
    (tmp_path / "one.txt").write_bytes("First line.\r\nSecond é.\n".encode())
    records = [{"text": "A text\nof two lines.", "id": 3}, {"messages": [PROMPT, ANSWER]}]
    (tmp_path / "two.jsonl").write_text("\n\n".join(map(json.dumps, records)) + "\n")
    texts = ["First line.\r\nSecond é.\n", "A text\nof two lines."]
    found = list(read_documents(str(tmp_path / "*")))
    assert found == [{"text": texts[0]}, {"text": texts[1]}, {"messages": [PROMPT, ANSWER]}]
    found = list(read_documents([tmp_path / "one.txt", str(tmp_path / "two.jsonl")], max_bytes=14))
    assert [document["text"] for document in found[:-1]] == [
        "First line.\r\n",
        "Second é.\n",
        "A text\n",
        "of two lines.",
    ]


def test_read_documents_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_documents(str(tmp_path / "nothing*"))
    file = tmp_path / "bad.jsonl"
    for content, message in [
        (b'{"text": "x"}\n{oops}\n', "line 2 is not JSON"),
        (b'["x"]\n', "line 1 must be an object"),
        (b'{"prompt": "x"}\n', "line 1 must be an object"),
        (b'{"text": "\xff"}\n', "is not UTF-8"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(read_documents(str(file)))


def test_hub_documents(monkeypatch):
    calls = []

    def load_dataset(path, **kwargs):
        calls.append((path, kwargs))
        return iter([{"text": "one two", "messages": None}, {"messages": [PROMPT]}, {"prompt": "x"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    documents = hub_documents("a/b", name="en", max_bytes=4)
    assert [next(documents) for _ in range(3)] == [{"text": "one "}, {"text": "two"}, {"messages": [PROMPT]}]
    assert calls == [("a/b", {"split": "train", "streaming": True, "name": "en"})]
    with pytest.raises(ValueError, match="prompt"):
        next(documents)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        hub_documents("a/b")


# -- streaming ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 10), st.integers(0, 5))
def test_shuffled(count, buffer_size, seed):
    order = list(shuffled(range(count), buffer_size, seed))
    assert sorted(order) == list(range(count))
    assert all(item < place + buffer_size for place, item in enumerate(order))  # no more than the buffer is read ahead
    assert order == list(shuffled(range(count), buffer_size, seed))


def first_bytes(examples):
    return [bytes(example.student.ids[1:4].tolist()).decode() for example in examples]


def numbered():
    return ({"text": f"{number:03d}"} for number in range(50))


def test_dataset():
    encoder = ParallelEncoder(byte_tokenizer(), subword_tokenizer())
    everything = [f"{number:03d}" for number in range(50)]
    assert first_bytes(DistillationDataset(numbered, encoder, batch_documents=7)) == everything
    shuffling = DistillationDataset(numbered, encoder, shuffle_buffer=20, seed=1)
    first = first_bytes(shuffling)
    assert sorted(first) == everything != first and first_bytes(shuffling) == first
    shuffling.set_epoch(1)
    assert sorted(first_bytes(shuffling)) == everything and first_bytes(shuffling) != first

    replicas = [DistillationDataset(numbered, encoder, num_replicas=3, rank=rank) for rank in range(3)]
    assert sorted(chain(*map(first_bytes, replicas))) == everything

    packed = list(DistillationDataset(numbered, ParallelEncoder(byte_tokenizer(), max_student_length=20), packed=True))
    assert sum((row.student.positions == 0).sum() for row in packed) == 50
    assert all(len(row.student) == 20 for row in packed[:-1])
    for options, message in [({"rank": 1}, "rank must be from 0"), ({"batch_documents": 0}, "batch_documents must be")]:
        with pytest.raises(ValueError, match=message):
            DistillationDataset(numbered, encoder, **options)


def test_workers_share_the_documents():
    encoder = ParallelEncoder(byte_tokenizer(), subword_tokenizer())
    dataset = DistillationDataset(numbered, encoder, num_replicas=2, rank=1)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=DistillationCollator())
    found = [bytes(row[1:4].tolist()).decode() for batch in loader for row in batch["input_ids"]]
    assert sorted(found) == first_bytes(dataset)
