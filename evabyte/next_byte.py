"""Taking the next byte from a distribution and deciding when a row has ended, both exactly as `generate` does."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .byte_tree import DraftTrees

# Processors whose result depends on the scores alone, so that all nodes of a tree may be processed together.
PREFIX_FREE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


class GrowingRows:
    """Prompts and the bytes emitted so far, each row at its own length.

    Attributes:
        texts: per row all ids, prompt first, as a list on the host.
        prompt_length: length of the prompts, padding included.
        finished: whether a row has ended.
    """

    def __init__(self, prompt: Tensor, stopping_criteria: StoppingCriteriaList) -> None:
        self._ids = prompt  # [B, capacity], behind `texts` until `_write` is called
        self._written = [prompt.shape[1]] * prompt.shape[0]
        self.texts: list[list[int]] = prompt.tolist()
        self.prompt_length = prompt.shape[1]
        self.finished = [False] * prompt.shape[0]
        self.eos_ids: set[int] = set()
        self.max_length: int | None = None
        self.other_criteria: list[Any] = []
        for criterion in stopping_criteria:
            if isinstance(criterion, EosTokenCriteria):
                self.eos_ids.update(criterion.eos_token_id.tolist())
            elif isinstance(criterion, MaxLengthCriteria):
                self.max_length = criterion.max_length
            else:
                self.other_criteria.append(criterion)

    @property
    def active(self) -> list[int]:
        """The rows that have not ended."""
        return [row for row, finished in enumerate(self.finished) if not finished]

    def append(self, row: int, byte: int) -> bool:
        """Emit a byte; -> whether the row ends, since a stopping criterion says so of its text up to this byte."""
        text = self.texts[row]
        text.append(byte)
        self.finished[row] = (
            byte in self.eos_ids
            or (self.max_length is not None and len(text) >= self.max_length)
            or any(self._stops(criterion, row) for criterion in self.other_criteria)
        )
        return self.finished[row]

    def _stops(self, criterion: Any, row: int) -> bool:
        # All rows are passed, since a criterion may go by a row's number; those of other lengths are ignored.
        verdict = criterion(self.prefixes(len(self.texts[row])), None)
        return bool(verdict[row]) if isinstance(verdict, Tensor) and verdict.ndim else bool(verdict)

    def prefixes(self, length: int) -> Tensor:
        """int64 [B, length], every row cut or padded to a length."""
        return self._write()[:, :length]

    def _write(self) -> Tensor:
        """The texts as one tensor, [B, at least the longest text]."""
        longest = max(map(len, self.texts))
        if longest > self._ids.shape[1]:
            more = max(longest - self._ids.shape[1], longest // 2)
            self._ids = torch.nn.functional.pad(self._ids, (0, more))
        for row, text in enumerate(self.texts):
            if self._written[row] < len(text):
                new = torch.tensor(text[self._written[row] :], device=self._ids.device)
                self._ids[row, self._written[row] : len(text)] = new
                self._written[row] = len(text)
        return self._ids

    def padded(self, pad_token_id: Tensor | None) -> Tensor:
        """int64 [B, longest text], rows that ended earlier padded on the right."""
        ids = self._write()[:, : max(map(len, self.texts))].clone()
        lengths = torch.tensor([len(text) for text in self.texts], device=ids.device)
        beyond = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
        return ids.masked_fill(beyond, 0 if pad_token_id is None else int(pad_token_id))


@dataclass(frozen=True)
class TypicalAcceptance:
    """Medusa's typical acceptance (arXiv 2401.10774, section 3.3): lossy, in exchange for longer steps.

    A drafted byte is accepted when its probability exceeds min(threshold, alpha * exp(-entropy)) of the distribution it
    would be drawn from. The output does not have the model's distribution.
    """

    threshold: float
    alpha: float

    def accepts(self, probs: Tensor, ids: Tensor, parents: Tensor) -> Tensor:
        """Probability [B, T] of every drafted node where it is accepted, 0 elsewhere; probs [B, T, vocab]."""
        at_parent = parents.clamp(min=0).expand(ids.shape)
        entropy = -(probs * probs.clamp(min=1e-10).log()).sum(-1)
        limit = (self.alpha * (-entropy).exp()).clamp(max=self.threshold)
        rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
        drafted = probs[rows, at_parent, ids]
        return drafted * ((drafted > limit.gather(1, at_parent)) & (parents >= 0))


class NextByte:
    """Takes the next byte of every row, as `generate` does: argmax or one multinomial draw of processed scores."""

    def __init__(self, processors: LogitsProcessorList, do_sample: bool) -> None:
        self.processors = processors
        self.do_sample = do_sample
        self.prefix_free = all(type(processor) in PREFIX_FREE for processor in processors)

    def process_nodes(self, logits: Tensor) -> Tensor:
        """Processed scores of logits [B, T, vocab], when no processor looks at the prefix."""
        if not self.processors:
            return logits
        flat = logits.flatten(0, 1)
        return self.processors(flat.new_zeros(flat.shape[0], 1, dtype=torch.int64), flat).view_as(logits)

    def process_rows(self, logits: Tensor, rows: GrowingRows, numbers: list[int]) -> Tensor:
        """Processed scores of logits [n, vocab], belonging to the rows of those numbers; each sees its true prefix."""
        scores = torch.empty_like(logits)
        lengths = [len(rows.texts[number]) for number in numbers]
        for length in set(lengths):
            here = [place for place, n in enumerate(lengths) if n == length]
            # All rows are passed, since a processor may go by a row's number; those of other lengths are ignored.
            everyone = logits.new_zeros(len(rows.texts), logits.shape[-1])
            everyone[[numbers[place] for place in here]] = logits[here]
            processed = self.processors(rows.prefixes(length), everyone)
            scores[here] = processed[[numbers[place] for place in here]]
        return scores

    def choose(self, scores: Tensor) -> Tensor:
        """int64 [n], from processed scores [n, vocab]."""
        if not self.do_sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)


class RowNoise:
    """The exponential noise of one row's draws, as torch.multinomial would draw it, from a generator of its own.

    With it `probs / noise` is largest at the byte that `generate` draws at batch size 1 from the same seed. What was
    drawn ahead and not used stays for the next walk.
    """

    def __init__(self, seed: int, vocab_size: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.shape = (1, vocab_size)
        self.drawn: list[Tensor] = []

    def ahead(self, count: int) -> Tensor:
        """float32 [count, vocab], of the next draws."""
        while len(self.drawn) < count:
            self.drawn.append(
                torch.empty(self.shape, device=self.generator.device).exponential_(generator=self.generator)
            )
        return torch.cat(self.drawn[:count])

    def use(self, count: int) -> None:
        """Leave the next `count` draws behind."""
        del self.drawn[:count]


class NodeDraws:
    """One multinomial draw at every node, such that the draws along a path are those `generate` would make.

    torch.multinomial draws exponential noise of the probabilities' shape and takes the largest ratio; here the noise of
    depth d is shared by all nodes of that depth, of which the walk visits one.
    """

    def __init__(self, scores: Tensor, trees: DraftTrees) -> None:
        self.device = scores.device
        self.state = self._generator().get_state()
        self.shape = (scores.shape[0], scores.shape[2])
        probs = scores.softmax(-1)
        noise = torch.stack([self._noise(probs) for _ in range(trees.max_depth + 1)], dim=1)  # [B, depths, vocab]
        depth = trees.mask.sum(-1).sub(1).clamp(min=0).expand(scores.shape[:2])
        rows = torch.arange(scores.shape[0], device=self.device)[:, None]
        self.chosen = (probs / noise[rows, depth]).argmax(-1)
        self.probs = probs

    def _noise(self, like: Tensor) -> Tensor:
        return torch.empty(self.shape, dtype=like.dtype, device=self.device).exponential_()

    def _generator(self) -> torch.Generator:
        if self.device.type == "cpu":
            return torch.default_generator
        module = torch.get_device_module(self.device)
        return module.default_generators[self.device.index or 0]

    def rewind(self, used: int) -> None:
        """Leave the random generator as if only the first `used` draws had been made."""
        self._generator().set_state(self.state)
        for _ in range(used):
            self._noise(self.probs)
