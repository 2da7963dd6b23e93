"""The losses of one batch, by name, from what student and teacher make of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evabyte.multibyte_loss import shift_for_heads

from .logprobs import SequenceLogProbs, sequence_logprobs
from .losses import IGNORED, alm_loss, chunk_logprobs, last_of_chunks, latents_loss, sft_loss

LOSSES = ("sft", "alm", "latents", "heads")


@dataclass(frozen=True)
class TeacherView:
    """What the teacher made of a batch: log-probabilities [B, T] and last hidden states [B, T, H]."""

    logprobs: SequenceLogProbs
    hidden: Tensor


@dataclass(frozen=True)
class Objective:
    """Which losses are taken, and how.

    Args:
        losses: names among `LOSSES`: "sft", the next byte's cross-entropy; "alm", the likelihoods of aligned chunks;
            "latents", the last hidden states at their ends; "heads", the bytes further ahead.
        student_spaces, teacher_spaces: bool masks over the vocabularies, for "alm" (see `space_mask`).
        alm: options of `chunk_logprobs` and `alm_loss` beyond their defaults.

    Raises:
        ValueError: for an unknown loss, no loss at all, or "alm" without masks.
    """

    losses: tuple[str, ...] = ("sft", "alm", "latents")
    student_spaces: Tensor | None = None
    teacher_spaces: Tensor | None = None
    space_threshold: float | None = 0.1
    append_space: bool = True
    difference: str = "binary_ce"
    temperature: float = 100.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.losses if name not in LOSSES]
        if unknown or not self.losses:
            raise ValueError(f"`losses` must name some of {', '.join(LOSSES)}; got {list(self.losses)}.")
        if "alm" in self.losses and (self.student_spaces is None or self.teacher_spaces is None):
            raise ValueError("`losses` has 'alm', which needs `student_spaces` and `teacher_spaces`: see `space_mask`.")

    @property
    def needs_teacher(self) -> bool:
        return "alm" in self.losses or "latents" in self.losses

    @torch.no_grad()
    def look(self, teacher: Any, batch: Mapping[str, Tensor], chunk_size: int = 256) -> TeacherView:
        """Run the teacher. Its logits exist a few rows at a time only.

        Args:
            teacher: a causal model of transformers with an output embedding.
            batch: of a `DistillationCollator`.
            chunk_size: tokens whose logits are held at a time.
        """
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = {name: batch[f"teacher_{name}"] for name in names if f"teacher_{name}" in batch}
        hidden = teacher.get_decoder()(**inputs, use_cache=False).last_hidden_state
        spaces = self.teacher_spaces.to(hidden.device) if self.teacher_spaces is not None else None
        head = _head_of(teacher)
        return TeacherView(sequence_logprobs(hidden, inputs["input_ids"], spaces, head, chunk_size), hidden)

    def __call__(
        self,
        hidden: Tensor,
        logits: Tensor,
        batch: Mapping[str, Tensor],
        teacher: TeacherView | None,
        average: Callable[[Tensor], Tensor] = lambda count: count,
    ) -> dict[str, Tensor]:
        """The losses, scalars by name.

        Args:
            hidden: [B, S, H], the student's last hidden states, after the final norm.
            logits: [B, S, heads, V], of all its prediction heads.
            batch: of a `DistillationCollator`.
            teacher: what `look` returned; None when no loss needs it.
            average: of a tensor over all devices. Each loss is divided by the mean of its items, so that the mean over
                devices is the loss of their batches together.
        """

        def items(counted: Tensor) -> Tensor:
            return average(counted.sum().float()).clamp(min=1)

        labels, found = batch["labels"], {}
        spaces = self.student_spaces.to(logits.device) if self.student_spaces is not None else None
        logprobs = sequence_logprobs(logits[:, :, 0], batch["input_ids"], spaces)
        if "sft" in self.losses:
            found["sft"] = sft_loss(logprobs.tokens, labels, items(labels[:, 1:] != IGNORED))
        if teacher is not None and "alm" in self.losses:
            chunks = chunk_logprobs(
                teacher.logprobs,
                logprobs,
                batch["teacher_chunks"],
                batch["chunks"],
                batch["teacher_labels"],
                labels,
                space_threshold=self.space_threshold,
                append_space=self.append_space,
            )
            counted = items(chunks.normalizer > 0)
            found["alm"] = alm_loss(chunks, self.difference, self.temperature, num_items=counted)  # type: ignore[arg-type]
        if teacher is not None and "latents" in self.losses:
            sides = (batch["teacher_chunks"], batch["chunks"])
            counted = items(last_of_chunks(sides[1], min(side.shape[1] for side in sides)) >= 0)
            found["latents"] = latents_loss(teacher.hidden, hidden, *sides, num_items=counted, average=average)
        if "heads" in self.losses and logits.shape[2] > 1:
            documents = (batch["position_ids"] == 0).cumsum(-1) if "position_ids" in batch else None
            targets = shift_for_heads(labels, logits.shape[2], document=documents)
            each = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 2), targets.flatten(), ignore_index=IGNORED, reduction="none"
            ).view_as(targets)
            counts = [items(targets[..., head] != IGNORED) for head in range(1, logits.shape[2])]
            found["heads"] = (each[..., 1:].sum((0, 1)) / torch.stack(counts)).mean()
        return {name: found[name] for name in self.losses if name in found}


def _head_of(model: Any) -> Any:
    """The function from hidden states to logits, soft cap included."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    output = model.get_output_embeddings()

    def head(hidden: Tensor) -> Tensor:
        logits = output(hidden)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


__all__ = ["LOSSES", "Objective", "TeacherView"]
