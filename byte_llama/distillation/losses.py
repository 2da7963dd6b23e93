"""Losses of cross-tokenizer distillation by Approximate Likelihood Matching (ALM, arXiv 2503.20083).

All are pure functions of tensors. They take log-probabilities (`sequence_logprobs`), and the chunk ids and labels of a
batch (`DistillationCollator`), whose chunks number at most as many as the shorter side has tokens.

Each loss is a mean. For gradient accumulation or several devices pass the number of all items as `num_items`, and add
the losses of the parts up.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .logprobs import SequenceLogProbs

IGNORED = -100  # label of what losses do not count, as everywhere in transformers

Difference = Literal["binary_ce", "reverse_binary_kl", "binary_kl_limit", "abs", "abs_exp", "k2", "k3"]
ChunkWeight = Literal["chunk", "token", "log1p_token"]
Normalization = Literal["l2_channelwise", "l2", "l1_channelwise", "l1"]

_EPSILON = 1e-6  # keeps probabilities below one


def sft_loss(logprobs: Tensor, labels: Tensor, num_items: Tensor | float | None = None) -> Tensor:
    """Cross-entropy of the next byte, a scalar.

    Args:
        logprobs: [B, S], log-probability of each id given those before it.
        labels: int64 [B, S], -100 for ids that do not count. The first of a row never counts.
        num_items: number of ids to divide by. Default: those of this batch.
    """
    counted = labels[:, 1:] != IGNORED
    return -_mean(logprobs[:, 1:], counted, num_items)


class ChunkLogProbs(NamedTuple):
    """Log-probabilities of chunks, or of groups of merged chunks.

    Attributes:
        teacher, student: [B, G], 0 where there is no chunk.
        counts: int64 [B, G], teacher tokens of each chunk; 0 where there is none, or where losses do not count it.
        normalizer: int64 [B, G], counts whose mean the loss is divided by: the same, but with `merged_twice`.
    """

    teacher: Tensor
    student: Tensor
    counts: Tensor
    normalizer: Tensor


def chunk_logprobs(
    teacher: SequenceLogProbs,
    student: SequenceLogProbs,
    teacher_chunks: Tensor,
    student_chunks: Tensor,
    teacher_labels: Tensor,
    student_labels: Tensor,
    *,
    space_threshold: float | None = 0.1,
    append_space: bool = True,
    merged_twice: bool = False,
) -> ChunkLogProbs:
    """Log-probabilities of the aligned chunks of a batch, on both sides.

    A chunk's is the sum over its tokens. A chunk counts if losses count all of its tokens, on both sides.

    Args:
        teacher, student: log-probabilities [B, T] and [B, S]; with `spaces`, unless neither of the next two is wanted.
        teacher_chunks, student_chunks: int64 [B, T] and [B, S], the chunk of each token, -1 for none.
        teacher_labels, student_labels: int64 [B, T] and [B, S], -100 for tokens that do not count.
        space_threshold: chunks are merged up to and including one after which the teacher gives space-like tokens more
            than this probability. None keeps them apart. Merging ends at chunks that do not count.
        append_space: add the log-probability of a space-like token after the (merged) chunk, on both sides (outcome
            chunk debiasing).
        merged_twice: take `normalizer` from counts that went through merging twice, and let merging pass over chunks
            that do not count, as the reference implementation does. Its loss is too large, and means nothing when
            almost all is merged: for comparisons only.

    Returns:
        `ChunkLogProbs` with G = min(T, S).

    Raises:
        ValueError: `spaces` are needed but missing.
    """
    if append_space or space_threshold is not None:
        teacher_spaces, student_spaces = _spaces_of(teacher, "teacher"), _spaces_of(student, "student")
    count = min(teacher_chunks.shape[1], student_chunks.shape[1])
    teacher_tokens, teacher_missing = _count_tokens(teacher_chunks, teacher_labels, count)
    student_tokens, student_missing = _count_tokens(student_chunks, student_labels, count)
    counted = (teacher_tokens > 0) & (student_tokens > 0) & (teacher_missing + student_missing == 0)
    counts = teacher_tokens * counted
    teacher_sums = sum_by_chunk(teacher.tokens, teacher_chunks, count).masked_fill(~counted, 0)
    student_sums = sum_by_chunk(student.tokens, student_chunks, count).masked_fill(~counted, 0)
    teacher_last = last_of_chunks(teacher_chunks, count)
    student_last = last_of_chunks(student_chunks, count)
    normalizer = counts

    if space_threshold is not None:
        # Without tokens in a chunk the reference looks at the first position.
        after = teacher_spaces.gather(1, (teacher_last * counted if merged_twice else teacher_last).clamp(min=0))
        closes = after.exp() > space_threshold
        if not merged_twice:
            closes |= torch.cat((~counted[:, 1:], torch.ones_like(counted[:, :1])), dim=1)
        groups = (closes.cumsum(1) - closes.long()).masked_fill(~counted, -1)
        teacher_sums = sum_by_chunk(teacher_sums, groups, count)
        student_sums = sum_by_chunk(student_sums, groups, count)
        counts = normalizer = sum_by_chunk(counts, groups, count)
        if merged_twice:
            normalizer = sum_by_chunk(counts, groups, count)
        last = last_of_chunks(groups, count)
        counted = last >= 0
        teacher_last, student_last = (side.gather(1, last.clamp(min=0)) for side in (teacher_last, student_last))

    if append_space:
        teacher_after = teacher_spaces.gather(1, teacher_last.clamp(min=0))
        student_after = student_spaces.gather(1, student_last.clamp(min=0))
        teacher_sums = teacher_sums + teacher_after.masked_fill(~counted, 0)
        student_sums = student_sums + student_after.masked_fill(~counted, 0)
    return ChunkLogProbs(teacher_sums, student_sums, counts, normalizer)


def alm_loss(
    chunks: ChunkLogProbs,
    difference: Difference = "binary_ce",
    temperature: float = 100.0,
    weight: ChunkWeight = "chunk",
    normalize_by: Literal["chunk", "token"] = "chunk",
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Difference of the likelihoods that teacher and student give to the same chunks, a scalar.

    Args:
        chunks: from `chunk_logprobs`.
        difference: of the teacher's log-probability t and the student's s, both divided by the temperature unless said
            otherwise: `"binary_ce"` and `"reverse_binary_kl"` of the distributions [exp t, 1 - exp t] and likewise s
            (binarised f-divergence); `"binary_kl_limit"`, the forward one's limit for high temperatures, and `"abs"`,
            |t - s|, both of t and s undivided; `"abs_exp"`, |exp t - exp s|; `"k2"` and `"k3"`, estimators of
            the KL divergence.
        temperature: what log-probabilities are divided by.
        weight: of each chunk: one, its number of teacher tokens, or log(1 + that).
        normalize_by: whether to divide by the number of chunks, or of their teacher tokens.
        num_items: what to divide by instead of the number in this batch.

    Raises:
        ValueError: an option has no such value, or `temperature` is not positive.
    """
    for name, value, choices in (
        ("difference", difference, get_args(Difference)),
        ("weight", weight, get_args(ChunkWeight)),
        ("normalize_by", normalize_by, ("chunk", "token")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but is {value!r}.")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, but is {temperature}.")
    counted = chunks.counts > 0
    differences = _DIFFERENCES[difference](chunks.teacher, chunks.student, temperature)
    if weight != "chunk":
        differences = differences * (chunks.counts if weight == "token" else chunks.counts.log1p())
    if num_items is None:
        number = (chunks.normalizer > 0).sum() if normalize_by == "chunk" else chunks.normalizer.sum()
        num_items = number.clamp(min=1)
    return _mean(differences, counted, num_items)


def latents_loss(
    teacher_hidden: Tensor,
    student_hidden: Tensor,
    teacher_chunks: Tensor,
    student_chunks: Tensor,
    normalization: Normalization = "l2_channelwise",
    num_items: Tensor | float | None = None,
    epsilon: float = 1e-8,
    average: Callable[[Tensor], Tensor] = lambda local: local,
) -> Tensor:
    """Difference of hidden states at the last token of each chunk, relative to the size of the teacher's, a scalar.

    Args:
        teacher_hidden, student_hidden: [B, T, H] and [B, S, H], of one layer: after the final norm, usually.
        teacher_chunks, student_chunks: int64 [B, T] and [B, S], the chunk of each token, -1 for none. Chunks count
            whether or not labels count them.
        normalization: `"l2"` for squared or `"l1"` for absolute differences, divided by the mean of the same of the
            teacher's states; `"..._channelwise"` takes that mean for each channel.
        num_items: number of chunks to divide by. Default: those of this batch.
        epsilon: added to what is divided by.
        average: of a tensor over all devices, so that the teacher's size is that in all their batches together.

    Raises:
        ValueError: hidden sizes differ, or `normalization` has no such value.
    """
    if teacher_hidden.shape[-1] != student_hidden.shape[-1]:
        raise ValueError(
            f"teacher_hidden and student_hidden must have the same size, but have {teacher_hidden.shape[-1]} and "
            f"{student_hidden.shape[-1]}: project one of them."
        )
    if normalization not in get_args(Normalization):
        choices = ", ".join(map(repr, get_args(Normalization)))
        raise ValueError(f"normalization must be one of {choices}, but is {normalization!r}.")
    count = min(teacher_chunks.shape[1], student_chunks.shape[1])
    last = last_of_chunks(student_chunks, count)
    exists = last >= 0
    student = _states_at(student_hidden, last)
    teacher = _states_at(teacher_hidden, last_of_chunks(teacher_chunks, count))
    measure = torch.square if normalization.startswith("l2") else torch.abs
    number = average(exists.sum().float())
    sizes = average((measure(teacher) * exists[..., None]).sum((0, 1))) / torch.where(number > 0, number, 1)  # [H]
    scale = sizes if normalization.endswith("channelwise") else sizes.mean()
    return _mean((measure(student - teacher) / (scale + epsilon)).mean(-1), exists, num_items)


def sum_by_chunk(values: Tensor, chunks: Tensor, count: int) -> Tensor:
    """Sum of the values [B, T] of each chunk, [B, count], given chunk ids int64 [B, T], -1 for none."""
    sums = values.new_zeros(values.shape[0], count + 1)
    return sums.scatter_add(1, chunks.masked_fill(chunks < 0, count), values)[:, :count]


def last_of_chunks(chunks: Tensor, count: int) -> Tensor:
    """Last position of each chunk, int64 [B, count], given chunk ids int64 [B, T]; -1 for chunks without any."""
    positions = torch.arange(chunks.shape[1], device=chunks.device).expand_as(chunks)
    last = chunks.new_full((chunks.shape[0], count + 1), -1)
    return last.scatter_reduce(1, chunks.masked_fill(chunks < 0, count), positions, "amax")[:, :count]


def _spaces_of(logprobs: SequenceLogProbs, argument: str) -> Tensor:
    if logprobs.spaces is None:
        raise ValueError(
            f"{argument} needs log-probabilities of space-like ids: pass a space_mask to sequence_logprobs, or "
            "space_threshold=None and append_space=False here."
        )
    return logprobs.spaces


def _count_tokens(chunks: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Number of tokens of each chunk that losses count, and of the others, both int64 [B, count]."""
    counted = labels != IGNORED
    counted[:, 0] = False  # nothing predicts it
    return sum_by_chunk(counted.long(), chunks, count), sum_by_chunk((~counted).long(), chunks, count)


def _states_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [B, T, H] at positions int64 [B, G] (any where -1), at least in float32: [B, G, H]."""
    states = hidden.take_along_dim(positions.clamp(min=0)[..., None], dim=1)
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _mean(values: Tensor, counted: Tensor, num_items: Tensor | float | None) -> Tensor:
    if num_items is None:
        num_items = counted.sum().clamp(min=1)
    return values.masked_fill(~counted, 0.0).sum() / num_items


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, precise for both small and large -x (Mächler 2012)."""
    return torch.where(x > -0.6931471805599453, (-x.expm1()).log(), (-x.exp()).log1p())


def _binary_ce(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    t, s = teacher / temperature - _EPSILON, student / temperature - _EPSILON
    return -(t.exp() * s - t.expm1() * log1mexp(s))


def _reverse_binary_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    t, s = teacher / temperature - _EPSILON, student / temperature - _EPSILON
    return s.exp() * (s - t) - s.expm1() * (log1mexp(s) - log1mexp(t))


def _binary_kl_limit(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    t, s = teacher - _EPSILON, student - _EPSILON
    return t - s + t * ((-s).log() - (-t).log())


def _abs(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    return (teacher - student).abs()


def _abs_exp(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    t, s = teacher / temperature - _EPSILON, student / temperature - _EPSILON
    return (t.exp() - s.exp()).abs()


def _k2(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    return ((teacher - student) / temperature).square() / 2


def _k3(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    log_ratio = (teacher - student) / temperature
    return log_ratio.expm1() - log_ratio


_DIFFERENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "binary_ce": _binary_ce,
    "reverse_binary_kl": _reverse_binary_kl,
    "binary_kl_limit": _binary_kl_limit,
    "abs": _abs,
    "abs_exp": _abs_exp,
    "k2": _k2,
    "k3": _k3,
}

__all__ = [
    "IGNORED",
    "ChunkLogProbs",
    "alm_loss",
    "chunk_logprobs",
    "last_of_chunks",
    "latents_loss",
    "log1mexp",
    "sft_loss",
    "sum_by_chunk",
]
