"""Losses against the reference's values and gradients, plain loops, and finite differences."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from byte_llama.distillation import (
    ChunkLogProbs,
    SequenceLogProbs,
    alm_loss,
    chunk_logprobs,
    latents_loss,
    sequence_logprobs,
    sft_loss,
)
from byte_llama.distillation.losses import last_of_chunks, log1mexp

GOLDENS = Path(__file__).parents[2] / "goldens" / "byte_llama" / "alm"
PARTS = {"all": slice(0, 4), "first_half": slice(0, 2), "second_half": slice(2, 4)}
KINDS = ["unconstrained", "space", "unbiased"]
MODES = {
    "plain": {"space_threshold": None, "append_space": False},
    "append_space": {"space_threshold": None},
    "merge_by_space_prob": {"append_space": False},
    "merge_by_space_prob+append_space": {},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -- goldens -----------------------------------------------------------------------------------------------------------


@cache
def record():
    return json.loads((GOLDENS / "losses.json").read_text())["outputs"]


@cache
def tensors():
    return load_file(GOLDENS / "losses.safetensors")


def chunk_ids(matrix):
    return torch.where(matrix.bool().any(-1), matrix.argmax(-1), -1)


class GoldenBatch:
    """The inputs of the golden losses, as rows of the whole batch."""

    def __init__(self, kind="unconstrained", part="all"):
        data, rows = tensors(), PARTS[part]
        self.logits = data["in.student_logits"][rows].clone().requires_grad_()
        teacher_logits = data["in.teacher_logits"][rows] + data["in.logit_mask_teacher"]
        ids, teacher_ids = (data[f"in.input_ids_{side}"][rows].long() for side in ("new", "original"))
        space_masks = (data["in.space_mask_new"].bool(), data["in.space_mask_teacher"].bool())
        self.student = sequence_logprobs(self.logits + data["in.logit_mask_new"], ids, space_masks[0])
        self.teacher = sequence_logprobs(teacher_logits, teacher_ids, space_masks[1])
        self.labels = ids.masked_fill(data["in.loss_mask_new"][rows] == 0, -100)
        self.teacher_labels = teacher_ids.masked_fill(data["in.loss_mask_original"][rows] == 0, -100)
        self.chunks = chunk_ids(data[f"in.alignment_matrix_a_{kind}"][rows])
        self.teacher_chunks = chunk_ids(data[f"in.alignment_matrix_b_{kind}"][rows])

    def of_chunks(self, **options):
        sides = (self.teacher, self.student, self.teacher_chunks, self.chunks, self.teacher_labels, self.labels)
        return chunk_logprobs(*sides, **options)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.logits)[0]


def assert_close(value, name):
    torch.testing.assert_close(value, torch.tensor(record()[name]), rtol=2e-5, atol=1e-6)


def assert_gradient(gradient, name):
    torch.testing.assert_close(gradient, tensors()[f"out.{name}"], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("part", PARTS)
def test_golden_sft(part):
    batch = GoldenBatch(part=part)
    # The reference averages over the parts what we add up.
    items = None if part == "all" else (tensors()["in.loss_mask_new"][:, 1:].sum() / 2).item()
    loss = sft_loss(batch.student.tokens, batch.labels, items)
    assert_close(loss, f"sft/{part}")
    assert_gradient(batch.gradient(loss), f"sft.{part}.dlogits")


@pytest.mark.parametrize("part", PARTS)
def test_golden_alm(part):
    batch = GoldenBatch(part=part)
    loss = alm_loss(batch.of_chunks(merged_twice=True))
    assert_close(loss, f"alm_unconstrained/{part}")
    assert_gradient(batch.gradient(loss), f"alm_unconstrained.{part}.dlogits")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_golden_alm_modes(kind, mode):
    batch = GoldenBatch(kind)
    loss = alm_loss(batch.of_chunks(merged_twice=True, **MODES[mode]))
    assert_close(loss, f"alm_{kind}/mode={mode}")
    if (kind, mode) == ("unconstrained", "append_space"):
        assert_gradient(batch.gradient(loss), "alm_unconstrained.mode_append_space.dlogits")


@pytest.mark.parametrize("part", ["first_half", "second_half"])
def test_golden_alm_of_a_part(part):
    whole = GoldenBatch().of_chunks(**MODES["append_space"])
    chunks = GoldenBatch(part=part).of_chunks(**MODES["append_space"])
    loss = alm_loss(chunks, num_items=(whole.counts > 0).sum() / 2)
    assert_close(loss, f"alm_unconstrained/mode=append_space/{part}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("diff_fn=abs", {"difference": "abs"}),
        ("diff_fn=reverse_binary_kl", {"difference": "reverse_binary_kl"}),
        ("diff_fn=binary_kl_temp_limit", {"difference": "binary_kl_limit"}),
        ("diff_fn=abs_exp", {"difference": "abs_exp"}),
        ("diff_fn=joschu_k2", {"difference": "k2"}),
        ("diff_fn=joschu_k3", {"difference": "k3"}),
        ("temp=1.0", {"temperature": 1.0}),
        ("temp=10.0", {"temperature": 10.0}),
        ("numerator=token_count", {"weight": "token"}),
        ("numerator=log1p_token_count", {"weight": "log1p_token"}),
        ("denominator=token_count", {"normalize_by": "token"}),
    ],
)
def test_golden_alm_options(name, options):
    assert_close(alm_loss(GoldenBatch().of_chunks(merged_twice=True), **options), f"alm_unconstrained/{name}")


@pytest.mark.parametrize("threshold", [0.02, 0.5])
def test_golden_alm_thresholds(threshold):
    chunks = GoldenBatch().of_chunks(space_threshold=threshold, merged_twice=True)
    assert_close(alm_loss(chunks), f"alm_unconstrained/threshold={threshold}")


def test_when_almost_all_merges():
    assert record()["alm_unconstrained/threshold=0.99"] == "nan"
    assert GoldenBatch().of_chunks(space_threshold=0.99, merged_twice=True).normalizer.sum() == 0
    chunks = GoldenBatch().of_chunks(space_threshold=0.99)
    assert (chunks.counts > 0).sum() == 4 and alm_loss(chunks).isfinite()


def test_golden_chunks_after_merging():
    report = record()["alm_unconstrained/all/report"]
    chunks = GoldenBatch().of_chunks()
    counted = chunks.counts > 0
    values = {
        "t_mean_p": chunks.teacher[counted].mean(),
        "t_max_p": chunks.teacher[counted].max(),
        "s_mean_p": chunks.student[counted].mean(),
        "s_min_p": chunks.student.min(),
        "teacher_avg_chunk_lengths_after_merge": chunks.counts[counted].float().mean(),
    }
    for name, value in values.items():
        torch.testing.assert_close(value, torch.tensor(report[name]), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("normalization", ["l2_channelwise", "l2", "l1_channelwise", "l1"])
@pytest.mark.parametrize("kind", ["unconstrained", "space"])
@pytest.mark.parametrize("layers", ["last_hidden_state", "all_hidden_states"])
def test_golden_latents(layers, kind, normalization):
    batch, data = GoldenBatch(kind), tensors()
    losses = [
        latents_loss(
            data[f"in.teacher_hidden.{layer}"],
            data[f"in.student_hidden.{layer}"],
            batch.teacher_chunks,
            batch.chunks,
            normalization,
        )
        for layer in ([2] if layers == "last_hidden_state" else [0, 1, 2])
    ]
    name = {"unconstrained": "naive"}.get(kind, kind)
    assert_close(torch.stack(losses).mean(), f"alm_latents/{layers}/{normalization}/{name}")


@pytest.mark.parametrize("part", PARTS)
def test_golden_latents_of_parts(part):
    batch, data, rows = GoldenBatch(part=part), tensors(), PARTS[part]
    items = None if part == "all" else (last_of_chunks(GoldenBatch().chunks, 32) >= 0).sum() / 2
    hidden = data["in.student_hidden.2"][rows].clone().requires_grad_()
    teacher_hidden = data["in.teacher_hidden.2"][rows]
    loss = latents_loss(teacher_hidden, hidden, batch.teacher_chunks, batch.chunks, num_items=items)
    assert_close(loss, f"alm_latents/{part}")
    assert_gradient(torch.autograd.grad(loss, hidden)[0], f"alm_latents.{part}.dhidden2")


def test_golden_details():
    data = tensors()
    for side, chunks in (("a", GoldenBatch().chunks), ("b", GoldenBatch().teacher_chunks)):
        last, mask = data[f"out.last_index_{side}"].long(), data[f"out.last_index_{side}_mask"].bool()
        assert torch.equal(last_of_chunks(chunks, 32), last.masked_fill(~mask, -1))
    torch.testing.assert_close(log1mexp(data["in.log1mexp_x"]), data["out.log1mexp"], rtol=2e-5, atol=1e-6)


# -- plain loops -------------------------------------------------------------------------------------------------------


def alm_by_loops(batch, threshold=0.1, append_space=True, temperature=100.0):
    """The loss with binary cross-entropy as the paper says it, chunk by chunk; a mean over the groups of the batch."""
    losses = []
    for row in range(len(batch.chunks)):
        groups, current = [], None
        sides = [
            (side.tokens[row].tolist(), side.spaces[row].tolist(), chunks[row].tolist(), labels[row].tolist())
            for side, chunks, labels in (
                (batch.teacher, batch.teacher_chunks, batch.teacher_labels),
                (batch.student, batch.chunks, batch.labels),
            )
        ]
        for chunk in range(max(sides[0][2]) + 1):
            tokens = [[i for i, of in enumerate(side[2]) if of == chunk] for side in sides]
            if any(i == 0 or side[3][i] == -100 for side, own in zip(sides, tokens, strict=True) for i in own):
                current = None
                continue
            if current is None:
                current = []
                groups.append(current)
            current.append(tokens)
            if threshold is None or math.exp(sides[0][1][tokens[0][-1]]) > threshold:
                current = None
        for group in groups:
            t, s = (
                sum(side[0][i] for tokens in group for i in tokens[which])
                + (side[1][group[-1][which][-1]] if append_space else 0)
                for which, side in enumerate(sides)
            )
            p, q = math.exp(t / temperature - 1e-6), math.exp(s / temperature - 1e-6)
            losses.append(-p * math.log(q) - (1 - p) * math.log(1 - q))
    return sum(losses) / max(len(losses), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_alm_merges_once(kind, mode):
    batch = GoldenBatch(kind)
    options = {"threshold": MODES[mode].get("space_threshold", 0.1), "append_space": "append" in mode}
    expected = alm_by_loops(batch, **options)
    assert alm_loss(batch.of_chunks(**MODES[mode])).item() == pytest.approx(expected, rel=2e-4)


class RandomBatch(GoldenBatch):
    """Random rows whose chunks are real runs of tokens, with tokens left out and prompts that do not count."""

    def __init__(self, seed, batch=2, teacher_length=9, length=17, vocab=6):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def side(size):
            states = random(batch, size, vocab)
            ids = torch.randint(vocab, (batch, size), generator=generator)
            space = torch.tensor([True, False, True, *[False] * (vocab - 3)])
            steps = torch.randint(3, (batch, size), generator=generator) == 0
            chunks = (steps.long().cumsum(1) - 1).clamp(max=6)
            masked = torch.randint(4, (batch, 7), generator=generator) == 0
            return states, ids, space, chunks, masked

        states, ids, space, self.teacher_chunks, masked = side(teacher_length)
        self.teacher = sequence_logprobs(states, ids, space)
        self.logits, student_ids, space, self.chunks, _ = side(length)
        self.logits.requires_grad_()
        self.student = sequence_logprobs(self.logits, student_ids, space)
        last = torch.minimum(self.teacher_chunks.amax(1), self.chunks.amax(1))[:, None]
        self.teacher_chunks[self.teacher_chunks > last] = -1
        self.chunks[self.chunks > last] = -1
        self.teacher_labels = ids.masked_fill(masked.gather(1, self.teacher_chunks.clamp(min=0)), -100)
        self.labels = student_ids.masked_fill(masked.gather(1, self.chunks.clamp(min=0)), -100)
        # A token that does not count takes its whole chunk with it.
        self.labels[:, torch.randint(length, (1,), generator=generator)] = -100


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([None, 0.2, 0.4, 0.7]), st.booleans())
def test_alm_equals_loops(seed, threshold, append_space):
    batch = RandomBatch(seed)
    expected = alm_by_loops(batch, threshold, append_space)
    loss = alm_loss(batch.of_chunks(space_threshold=threshold, append_space=append_space))
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.integers(0, 10**6))
def test_parts_add_up(seed):
    batch = RandomBatch(seed, batch=3)

    def losses(rows, items=(None, None, None)):
        chunks = chunk_logprobs(
            *(SequenceLogProbs(side.tokens[rows], side.spaces[rows]) for side in (batch.teacher, batch.student)),
            *(ids[rows] for ids in (batch.teacher_chunks, batch.chunks, batch.teacher_labels, batch.labels)),
        )
        states = torch.arange(3 * 17 * 2.0).view(3, 17, 2).sin()
        sides = (states[rows, :9], states[rows], batch.teacher_chunks[rows], batch.chunks[rows])
        return torch.stack(
            [
                sft_loss(batch.student.tokens[rows], batch.labels[rows], items[0]),
                alm_loss(chunks, num_items=items[1]),
                # Without normalisation by the teacher's states, which are those of the part.
                latents_loss(*sides, num_items=items[2], epsilon=1e12),
            ]
        ), (
            (batch.labels[rows, 1:] != -100).sum(),
            (chunks.counts > 0).sum(),
            (last_of_chunks(batch.chunks[rows], 9) >= 0).sum(),
        )

    whole, _ = losses(slice(None))
    items = [sum(counts) for counts in zip(*(losses([row])[1] for row in range(3)), strict=True)]
    items = [max(int(count), 1) for count in items]
    parts = sum(losses([row], items)[0] for row in range(3))
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-15)


def test_packed_documents_are_as_if_alone():
    """Chunks and labels of two documents in one row; merging stops between them."""
    batch = RandomBatch(3, batch=2)
    batch.teacher_labels[:, 0] = batch.labels[:, 0] = -100
    alone = batch.of_chunks(space_threshold=0.99)

    def join(first, second):
        return torch.cat((first, second))[None]

    count = batch.chunks[0].max() + 1
    teacher, student = (
        SequenceLogProbs(join(*side.tokens), join(*side.spaces)) for side in (batch.teacher, batch.student)
    )
    teacher_chunks, chunks = (
        join(ids[0], torch.where(ids[1] < 0, -1, ids[1] + count)) for ids in (batch.teacher_chunks, batch.chunks)
    )
    labels = [join(*labels) for labels in (batch.teacher_labels, batch.labels)]
    packed = chunk_logprobs(teacher, student, teacher_chunks, chunks, *labels, space_threshold=0.99)
    for name in ("teacher", "student", "counts"):
        values, expected = getattr(packed, name), getattr(alone, name)
        torch.testing.assert_close(values[packed.counts > 0], expected[alone.counts > 0])
    assert (alone.counts > 0).any(1).all()


def test_nothing_to_count():
    batch = RandomBatch(0)
    batch.labels[:] = -100
    chunks = batch.of_chunks()
    none = torch.full_like(batch.chunks, -1)
    losses = [
        sft_loss(batch.student.tokens, batch.labels),
        alm_loss(chunks),
        latents_loss(torch.ones(2, 9, 3), torch.zeros(2, 17, 3), none[:, :9], none),
    ]
    assert [loss.item() for loss in losses] == [0, 0, 0]
    assert batch.gradient(losses[0] + losses[1]).abs().sum() == 0


@pytest.mark.parametrize(
    "difference", ["binary_ce", "reverse_binary_kl", "binary_kl_limit", "abs", "abs_exp", "k2", "k3"]
)
def test_differences_are_finite(difference):
    ends = torch.tensor([[0.0, -1e-7, -1e-3, -0.7, -50.0, -5e3]])
    teacher, student = ends.repeat_interleave(6, 1), ends.repeat(1, 6).requires_grad_()
    counts = torch.ones(1, 36, dtype=torch.int64)
    loss = alm_loss(ChunkLogProbs(teacher, student, counts, counts), difference)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and gradient.isfinite().all()
    if difference not in ("binary_ce", "binary_kl_limit"):  # differences proper, where equal sides differ by nothing
        same = ChunkLogProbs(ends, ends, counts[:, :6], counts[:, :6])
        assert alm_loss(same, difference).item() == pytest.approx(0, abs=1e-6)


# -- finite differences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", ["binary_ce", "reverse_binary_kl", "binary_kl_limit", "abs_exp", "k2", "k3"])
@pytest.mark.parametrize("mode", ["plain", "merge_by_space_prob+append_space"])
def test_alm_gradients(difference, mode):
    batch = RandomBatch(11, batch=1, teacher_length=6, length=9, vocab=4)
    ids = torch.arange(9)[None] % 4

    def loss(logits):
        batch.student = sequence_logprobs(logits, ids, torch.tensor([True, False, True, False]), chunk_size=4)
        return alm_loss(batch.of_chunks(**MODES[mode]), difference, temperature=3.0)

    assert loss(batch.logits).requires_grad and batch.gradient(loss(batch.logits)).abs().sum() > 0
    assert torch.autograd.gradcheck(loss, batch.logits)


@pytest.mark.parametrize("normalization", ["l2_channelwise", "l2", "l1_channelwise", "l1"])
def test_latents_gradients(normalization):
    batch = RandomBatch(5, batch=1, teacher_length=6, length=9)
    teacher = torch.randn(1, 6, 3, dtype=torch.float64)
    student = torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda hidden: latents_loss(teacher, hidden, batch.teacher_chunks, batch.chunks, normalization), student
    )


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors():
    batch = RandomBatch(0)
    chunks, hidden, short = batch.of_chunks(), torch.zeros(2, 9, 3), torch.zeros(2, 17, 2)
    batch.teacher = SequenceLogProbs(batch.teacher.tokens)
    for call, message in [
        (lambda: batch.of_chunks(), "space_mask"),
        (lambda: alm_loss(chunks, "kl"), "difference must be one of"),
        (lambda: alm_loss(chunks, weight="chunks"), "weight must be one of"),
        (lambda: alm_loss(chunks, normalize_by="bytes"), "normalize_by must be one of"),
        (lambda: alm_loss(chunks, temperature=0), "temperature must be positive"),
        (lambda: latents_loss(hidden, short, batch.teacher_chunks, batch.chunks), "same size"),
        (lambda: latents_loss(hidden, hidden, batch.teacher_chunks, batch.chunks, "l3"), "normalization must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
