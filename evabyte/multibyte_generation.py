"""Multibyte decoding: draft a tree of bytes, verify it in one forward, commit the path the model itself takes.

At each node of the tree the next byte is taken from the processed distribution there exactly as `generate` takes it, by
argmax or by one multinomial draw. If a child carries that byte the walk steps to it; if none does, the byte is emitted
and the walk ends. What is emitted never depends on what was drafted, so decoding is lossless for every sampler: greedy
output equals `generate`'s, sampled output has its distribution, and at batch size 1 the same seed draws the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    GenerationMode,
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
from transformers.generation.streamers import BaseStreamer

from .byte_tree import ByteTree

# Processors whose result depends on the scores alone, so that the nodes of a tree may be processed together.
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
SUPPORTED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass
class MultibyteGenerateOutput(GenerateDecoderOnlyOutput):
    """What `multi_byte_generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: int64 [B, L], prompt and new bytes, padded on the right.
        acc_lengths: int64 [B, forwards], bytes that each forward brought, the prefill's single byte first.
        scores, logits: as `generate` returns them; zero where a row had already ended.
    """

    acc_lengths: Tensor | None = None


class GrowingRows:
    """Prompts and the bytes emitted so far, each row at its own length.

    Attributes:
        ids: int64 [B, capacity]; row b is real up to `lengths[b]`.
        finished: rows that will not grow any more.
    """

    def __init__(self, prompt: Tensor, stopping_criteria: StoppingCriteriaList) -> None:
        self.ids = prompt
        self.prompt_length = prompt.shape[1]
        self.lengths = [prompt.shape[1]] * prompt.shape[0]
        self.finished = [False] * prompt.shape[0]
        self.eos_ids: set[int] = set()
        self.max_length: int | None = None
        self.other_criteria = []
        for criterion in stopping_criteria:
            if isinstance(criterion, EosTokenCriteria):
                self.eos_ids.update(criterion.eos_token_id.tolist())
            elif isinstance(criterion, MaxLengthCriteria):
                self.max_length = criterion.max_length
            else:
                self.other_criteria.append(criterion)

    @property
    def active(self) -> list[int]:
        return [row for row, finished in enumerate(self.finished) if not finished]

    def append(self, row: int, byte: int) -> None:
        """Emit a byte; the row is finished if a stopping criterion says so, exactly as `generate` would."""
        length = self.lengths[row]
        if length == self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, max(64, length // 2)))
        self.ids[row, length] = byte
        self.lengths[row] = length + 1
        self.finished[row] = (
            byte in self.eos_ids
            or (self.max_length is not None and length + 1 >= self.max_length)
            or any(bool(stop(self.ids[row : row + 1, : length + 1], None)) for stop in self.other_criteria)
        )

    def newest(self, row: int, count: int) -> Tensor:
        """int64 [count], the last bytes of a row."""
        return self.ids[row, self.lengths[row] - count : self.lengths[row]]

    def padded(self, pad_token_id: Tensor | None) -> Tensor:
        """int64 [B, longest row], rows that ended earlier padded on the right."""
        ids = self.ids[:, : max(self.lengths)].clone()
        beyond = torch.arange(ids.shape[1], device=ids.device) >= torch.tensor(self.lengths, device=ids.device)[:, None]
        return ids.masked_fill(beyond, 0 if pad_token_id is None else int(pad_token_id))


class NextByte:
    """Takes the next byte of every row from a distribution, as `generate` does."""

    def __init__(self, processors: LogitsProcessorList, do_sample: bool) -> None:
        self.processors = processors
        self.do_sample = do_sample
        self.prefix_free = all(type(processor) in PREFIX_FREE for processor in processors)

    def process(self, logits: Tensor, rows: GrowingRows) -> Tensor:
        """Processed scores [B, vocab] of raw logits [B, vocab]; processors see each row's true prefix."""
        if self.prefix_free:
            return self.processors(rows.ids[:, :1], logits)
        scores = torch.empty_like(logits)
        for length in {rows.lengths[row] for row in rows.active}:
            # All rows are passed, since a processor may go by the row's number; those of other lengths are ignored.
            processed = self.processors(rows.ids[:, :length], logits.clone())
            for row in rows.active:
                if rows.lengths[row] == length:
                    scores[row] = processed[row]
        return scores

    def choose(self, scores: Tensor) -> Tensor:
        """int64 [...], from processed scores [..., vocab]."""
        if not self.do_sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)


class Record:
    """Scores and raw logits of every emitted byte, when the caller wants them back."""

    def __init__(self, batch: int, generation_config: GenerationConfig) -> None:
        wanted = bool(generation_config.return_dict_in_generate)
        self.scores: list[list[Tensor]] | None = None
        self.logits: list[list[Tensor]] | None = None
        if wanted and generation_config.output_scores:
            self.scores = [[] for _ in range(batch)]
        if wanted and generation_config.output_logits:
            self.logits = [[] for _ in range(batch)]

    @property
    def wanted(self) -> bool:
        return self.scores is not None or self.logits is not None

    def add(self, row: int, scores: Tensor, logits: Tensor) -> None:
        if self.scores is not None:
            self.scores[row].append(scores)
        if self.logits is not None:
            self.logits[row].append(logits)

    @staticmethod
    def steps(rows: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
        """One [B, vocab] tensor per step, zero where a row had ended."""
        if rows is None:
            return None
        blank = torch.zeros_like(next(row[0] for row in rows if row))
        longest = max(map(len, rows))
        return tuple(torch.stack([row[step] if step < len(row) else blank for row in rows]) for step in range(longest))


def choose_tree(model: Any, draft: str | None, medusa_choices: Sequence[Sequence[int]] | None) -> ByteTree:
    """The draft tree a caller asked for, checked against the number of heads.

    Raises:
        ValueError: when both arguments are given, or the tree is deeper than the model has heads for.
    """
    max_depth = model.config.num_pred_heads - 1
    if medusa_choices is not None:
        if draft is not None:
            raise ValueError("Pass `draft` or `medusa_choices`, not both: each names a draft tree.")
        tree = ByteTree.from_paths(medusa_choices)
        if tree.max_depth > max_depth:
            raise ValueError(
                f"`medusa_choices` is {tree.max_depth} deep, but a model with {model.config.num_pred_heads} prediction "
                f"heads can draft {max_depth} bytes ahead; leave out the longer paths."
            )
        widest = max((max(path) for path in tree.paths), default=0)
        if widest >= model.config.vocab_size:
            raise ValueError(f"`medusa_choices` has rank {widest}, but there are {model.config.vocab_size} ids.")
        return tree
    if draft is None:
        # Verifying many nodes is nearly free on an accelerator and is not on a CPU.
        draft = "chain" if model.device.type == "cpu" else "tree95"
    return ByteTree.named(draft, max_depth)


def multibyte_decoding(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    tokenizer: Any = None,
    draft: str | None = None,
    medusa_choices: Sequence[Sequence[int]] | None = None,
    return_acc_lengths: bool = False,
    **model_kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor] | MultibyteGenerateOutput:
    """The decoding method behind `multi_byte_generate`, for `generate(custom_generate=multibyte_decoding)`.

    Called by `generate`, which prepares its arguments. `draft` is "chain", "tree31" or "tree95" (the published trees);
    `medusa_choices` a tree of one's own, as a list of paths. Returns ids [B, L]; with `return_acc_lengths` also the
    bytes each forward brought, int64 [B, forwards]; or a [`MultibyteGenerateOutput`] with `return_dict_in_generate`.
    """
    if not model_kwargs.get("use_cache", True):
        raise ValueError("Multibyte decoding verifies drafts against a cache: leave `use_cache` at True.")
    if streamer is not None and input_ids.shape[0] > 1:
        raise ValueError("`streamer` takes one sequence; rows of a batch advance at different speed.")
    tree = choose_tree(model, draft, medusa_choices)
    mask = tree.mask[None].to(model.device)
    rows = GrowingRows(input_ids, stopping_criteria)
    next_byte = NextByte(logits_processor, bool(generation_config.do_sample))
    record = Record(input_ids.shape[0], generation_config)
    acc_lengths: list[list[int]] = []

    outputs = model._prefill(input_ids, generation_config, {**model_kwargs, "return_all_pred_logits": True})
    cache = outputs.past_key_values
    logits = outputs.logits[:, -1:].to(torch.float32)  # [B, nodes, heads, vocab]; the prompt's last byte is a lone root
    nodes = input_ids.new_zeros(input_ids.shape[0], 1)
    paths = _walk(nodes, [[]], logits, rows, next_byte, record)
    acc_lengths.append([len(path) for path in paths])
    _stream(streamer, rows, paths)
    while rows.active:
        last = torch.tensor([path[-1] if path else 0 for path in paths], device=logits.device)
        head_logits = logits[torch.arange(logits.shape[0], device=logits.device), last, 1:]
        root = torch.stack([rows.newest(row, 1)[0] for row in range(len(paths))])
        nodes = tree.fill(root, head_logits)
        outputs = model(input_ids=nodes, draft_tree=mask, past_key_values=cache, return_all_pred_logits=True)
        logits = outputs.logits.to(torch.float32)
        paths = _walk(nodes, tree.children, logits, rows, next_byte, record)
        _commit(cache, paths)
        acc_lengths.append([len(path) for path in paths])
        _stream(streamer, rows, paths)
    if streamer is not None:
        streamer.end()

    sequences = rows.padded(generation_config._pad_token_tensor)
    lengths = torch.tensor(acc_lengths).T
    if generation_config.return_dict_in_generate:
        return MultibyteGenerateOutput(
            sequences=sequences,
            scores=record.steps(record.scores),
            logits=record.steps(record.logits),
            past_key_values=cache,
            acc_lengths=lengths,
        )
    return (sequences, lengths) if return_acc_lengths else sequences


def _walk(
    nodes: Tensor, children: list[list[int]], logits: Tensor, rows: GrowingRows, next_byte: NextByte, record: Record
) -> list[list[int]]:
    """Emit bytes along the path the model takes through each row's tree.

    Args:
        nodes: int64 [B, T], ids of the trees' nodes.
        logits: [B, T, heads, vocab] at the nodes.

    Returns:
        per row the nodes at which a byte was emitted, from the root on; empty for a row that had ended before.
    """
    next_logits = logits[:, :, 0]
    ids = nodes.tolist()
    paths: list[list[int]] = [[] for _ in ids]
    at = {row: 0 for row in rows.active}  # where each walk stands
    greedy_everywhere = None
    if next_byte.prefix_free and not next_byte.do_sample and not record.wanted:
        scores = next_byte.process(next_logits.flatten(0, 1), rows).view_as(next_logits)
        greedy_everywhere = next_byte.choose(scores).tolist()
    while at:
        if greedy_everywhere is not None:
            chosen = {row: greedy_everywhere[row][node] for row, node in at.items()}
        else:
            places = torch.tensor([at.get(row, 0) for row in range(len(ids))], device=logits.device)
            here = next_logits[torch.arange(len(ids), device=logits.device), places]
            scores = next_byte.process(here, rows)
            walking = list(at)
            picked = next_byte.choose(scores[walking]).tolist()
            chosen = dict(zip(walking, picked, strict=True))
            if record.wanted:
                for row in walking:
                    record.add(row, scores[row], here[row])
        onward = {}
        for row, byte in chosen.items():
            node = at[row]
            paths[row].append(node)
            rows.append(row, byte)
            child = next((child for child in children[node] if ids[row][child] == byte), None)
            if child is not None and not rows.finished[row]:
                onward[row] = child
        at = onward
    return paths


def _commit(cache: Any, paths: list[list[int]]) -> None:
    """Keep in the cache the nodes at which a byte was emitted: what was read, not what was emitted last."""
    longest = max(map(len, paths))
    padded = torch.tensor([path + [0] * (longest - len(path)) for path in paths])
    for layer in cache.layers:
        layer.commit(padded, [len(path) for path in paths])


def _stream(streamer: BaseStreamer | None, rows: GrowingRows, paths: list[list[int]]) -> None:
    if streamer is not None:
        streamer.put(rows.newest(0, len(paths[0])).cpu())


class MultibyteGenerationMixin:
    """Gives a model with prediction heads `multi_byte_generate`; comes before `GenerationMixin` among the bases."""

    def multi_byte_generate(
        self,
        inputs: Tensor | None = None,
        draft: str | None = None,
        medusa_choices: Sequence[Sequence[int]] | None = None,
        return_acc_lengths: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor] | MultibyteGenerateOutput:
        """`generate` by multibyte decoding: the same arguments, the same bytes, fewer forwards.

        Args:
            inputs: int64 [B, N], or `input_ids` / `inputs_embeds` by name; rows may be padded on the left, with an
                `attention_mask`.
            draft: "chain" (the best byte of each head), "tree31" or "tree95"; by default a chain on CPU and the larger
                tree elsewhere.
            medusa_choices: a tree of one's own: a list of paths, each the rank chosen at every depth, such as (0, 1).
            return_acc_lengths: return `(ids, lengths)`; `lengths`, int64 [B, forwards], counts the bytes that each
                forward brought, the prefill's single byte first.
            temperature: as in `generate`; 0 means greedy.
            **kwargs: everything `generate` takes for greedy decoding and sampling.

        Returns:
            int64 [B, L], prompt and new bytes, or as the arguments above say.

        Raises:
            ValueError: for a decoding mode that is neither greedy nor sampling (beams, assistants), a tree deeper than
                the heads reach, and whatever `generate` refuses.
        """
        if kwargs.get("temperature") == 0:
            del kwargs["temperature"]
            kwargs["do_sample"] = False
        return self.generate(  # type: ignore[attr-defined]
            inputs,
            custom_generate=multibyte_decoding,
            draft=draft,
            medusa_choices=medusa_choices,
            return_acc_lengths=return_acc_lengths,
            **kwargs,
        )

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> dict[str, Any]:
        """Hand a streamer to our decoding method too; transformers keeps it from callables."""
        if custom_generate is not multibyte_decoding:
            return super()._extract_generation_mode_kwargs(  # type: ignore[misc]
                custom_generate, kwargs, synced_gpus, assistant_model, streamer
            )
        own = {name: kwargs.pop(name) for name in ("draft", "medusa_choices", "return_acc_lengths") if name in kwargs}
        general = super()._extract_generation_mode_kwargs(  # type: ignore[misc]
            None, kwargs, synced_gpus, assistant_model, streamer
        )
        return {**general, **own}

    def _validate_generation_mode(
        self,
        generation_mode: GenerationMode,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        """Refuse modes that multibyte decoding cannot stand in for."""
        super()._validate_generation_mode(  # type: ignore[misc]
            generation_mode, generation_config, generation_mode_kwargs
        )
        if "return_acc_lengths" in generation_mode_kwargs and generation_mode not in SUPPORTED_MODES:
            raise ValueError(
                f"Multibyte decoding replaces greedy decoding and sampling, not {generation_mode.value}: leave out the "
                "beams, penalties or assistants that ask for it, or call `generate`."
            )
