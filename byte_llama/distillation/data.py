"""Training data: documents read from files or from the Hugging Face hub, and a stream of encoded examples."""

import glob
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from .collation import pack_examples
from .encoding import Example, ParallelEncoder

Item = TypeVar("Item")
Document = Mapping[str, Any]


def cut_lines(lines: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Join lines into texts of at most `max_bytes` bytes, cutting longer lines behind a space if there is one.

    Args:
        lines: with their line ends. Nothing is lost: the texts together are the lines together.
        max_bytes: None for one text of everything.

    Raises:
        ValueError: `max_bytes` is less than 4, the longest character.
    """
    if max_bytes is None:
        yield "".join(lines)
        return
    if max_bytes < 4:
        raise ValueError(f"max_bytes must be at least 4, to hold any character, but is {max_bytes}.")
    text = b""
    for line in lines:
        data = line.encode()
        if text and len(text) + len(data) > max_bytes:
            yield text.decode()
            text = b""
        start = 0
        while len(data) - start > max_bytes:
            end = data.rfind(b" ", start, start + max_bytes) + 1 or start + max_bytes
            while data[end] & 0xC0 == 0x80:  # within a character
                end -= 1
            yield data[start:end].decode()
            start = end
        text += data[start:]
    if text:
        yield text.decode()


def read_documents(files: str | Sequence[str], max_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Documents of local files, one after the other, read as they are needed.

    Args:
        files: a path, or several; `*` and `**` stand for any names. A `.jsonl` file has a document a line, a dict with
            `"text"` or `"messages"`. Any other file is one plain text in UTF-8.
        max_bytes: cut longer plain texts into several, between lines where possible. Texts longer than the encoder's
            `max_student_length` lose what lies behind it, so pass a little less than that here.

    Yields:
        dicts with a `"text"` or `"messages"`.

    Raises:
        FileNotFoundError: a path or pattern names no file.
        ValueError: a line of a `.jsonl` file is no such dict, or a file is not UTF-8.
    """
    paths = []
    for pattern in [files] if isinstance(files, str) else files:
        found = sorted(glob.glob(str(pattern), recursive=True))
        if not found:
            raise FileNotFoundError(f"files holds {str(pattern)!r}, but there is no such file.")
        paths += found
    return _read(paths, max_bytes)


def _read(paths: Sequence[str], max_bytes: int | None) -> Iterator[dict[str, Any]]:
    for path in paths:
        with open(path, encoding="utf-8", newline="") as file:
            try:
                if not path.endswith(".jsonl"):
                    yield from ({"text": text} for text in cut_lines(file, max_bytes))
                    continue
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield from _documents_of(_parse(line, f"{path}, line {number}"), max_bytes)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first.") from error


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not {"text", "messages"} & record.keys():
        raise ValueError(f'{place} must be an object with "text" or "messages".')
    return record


def _documents_of(record: Mapping[str, Any], max_bytes: int | None) -> Iterator[dict[str, Any]]:
    if record.get("messages") is not None:
        yield {"messages": record["messages"]}
    elif max_bytes is None:
        yield {"text": record["text"]}
    else:
        yield from ({"text": text} for text in cut_lines(record["text"].splitlines(keepends=True), max_bytes))


def hub_documents(
    path: str, *, split: str = "train", streaming: bool = True, max_bytes: int | None = None, **kwargs: Any
) -> Iterator[dict[str, Any]]:
    """Documents of a dataset that has a column `"messages"` or `"text"`, by the `datasets` library.

    Args:
        path, split, streaming, kwargs: passed on to `datasets.load_dataset`.
        max_bytes: as for `read_documents`.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: a record has neither `"messages"` nor `"text"`.
    """
    try:
        load_dataset = import_module("datasets").load_dataset
    except ImportError as error:
        raise ImportError(
            "hub_documents needs the datasets library: `pip install datasets`, or pass files to read_documents."
        ) from error

    def documents() -> Iterator[dict[str, Any]]:
        for record in load_dataset(path, split=split, streaming=streaming, **kwargs):
            if record.get("messages") is None and record.get("text") is None:
                raise ValueError(f'The dataset {path!r} must have "messages" or "text", but has {sorted(record)}.')
            yield from _documents_of(record, max_bytes)

    return documents()


def shuffled(items: Iterable[Item], buffer_size: int, seed: int | str) -> Iterator[Item]:
    """The items in random order, as far as a buffer of `buffer_size` of them allows."""
    generator = random.Random(seed)
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        index = generator.randrange(buffer_size)
        yield buffer[index]
        buffer[index] = item
    generator.shuffle(buffer)
    yield from buffer


class DistillationDataset(IterableDataset[Example]):
    """A stream of examples, encoded as they are needed, for a `DataLoader` with a `DistillationCollator`.

    Each worker of a `DataLoader`, on each of `num_replicas` devices, encodes its own share of the documents; all read
    through all of them. Call `set_epoch` before each epoch for another order.

    Args:
        documents: begins to read the documents, in the same order each time, as in
            `lambda: read_documents("data/*.jsonl")`.
        encoder: turns documents into examples.
        shuffle_buffer: number of documents to shuffle at a time; 0 keeps their order.
        seed: of the shuffling.
        packed: whether to join documents into rows of the encoder's maximal lengths.
        batch_documents: number of documents encoded together.
        num_replicas, rank: number of devices that share the documents, and which of them this is.

    Raises:
        ValueError: `rank` is not below `num_replicas`, or `batch_documents` is less than 1.
    """

    def __init__(
        self,
        documents: Callable[[], Iterable[Document]],
        encoder: ParallelEncoder,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        packed: bool = False,
        batch_documents: int = 64,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be from 0 to num_replicas - 1 = {num_replicas - 1}, but is {rank}.")
        if batch_documents < 1:
            raise ValueError(f"batch_documents must be at least 1, but is {batch_documents}.")
        self.documents, self.encoder = documents, encoder
        self.shuffle_buffer, self.seed, self.packed = shuffle_buffer, seed, packed
        self.batch_documents, self.num_replicas, self.rank = batch_documents, num_replicas, rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order in which iterations from now on shuffle the documents."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Example]:
        examples = self._examples()
        if self.packed:
            return pack_examples(examples, self.encoder.max_student_length, self.encoder.max_teacher_length)
        return examples

    def _examples(self) -> Iterator[Example]:
        documents: Iterable[Document] = self.documents()
        if self.shuffle_buffer:
            documents = shuffled(documents, self.shuffle_buffer, f"{self.seed}, epoch {self.epoch}")
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        share = islice(documents, number * self.num_replicas + self.rank, None, self.num_replicas * workers)
        while batch := list(islice(share, self.batch_documents)):
            yield from self.encoder(batch)


__all__ = ["DistillationDataset", "cut_lines", "hub_documents", "read_documents", "shuffled"]
