"""Distillation on transformers' `Trainer`: what wraps, shards, saves, resumes and logs is the Trainer's own."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from .last_layer import LastLayerCopy
from .losses import IGNORED
from .objective import Objective
from .sharded_teacher import shard_teacher as share_out
from .step_clock import StepClock
from .weighting import gradient_norms, gradmag_weights, weighted_loss


class DistillationTrainer(Trainer):
    """Trains a byte-level student on what a frozen subword teacher says of the same text.

    Args:
        model: the student, a `ByteLlamaForCausalLM` or `ByteGemma2ForCausalLM`, possibly with LoRA.
        teacher: None, or the frozen teacher, moved to the student's device.
        objective: which losses are taken.
        weights: "gradmag", so that the gradients of all losses have the same size on the last layer
            (approx_gradmag_preserve_mag), or a number for each loss by name.
        shard_teacher: share the teacher's layers out over the processes of a distributed run.
        heldout: None, or batches of a `DistillationCollator` for `evaluate`, a list.
        samples: None, or a function of the student that returns lines of text for the log, called by `evaluate`.
        **kwargs: of `Trainer`. The data set gives examples and the collator batches of `byte_llama.distillation`.

    Raises:
        ValueError: for a loss that needs a teacher without one, weights that do not name the losses, and a data set
            whose columns the Trainer would drop.
        RuntimeError: `shard_teacher` outside a distributed run.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any | None,
        objective: Objective,
        weights: str | Mapping[str, float] = "gradmag",
        shard_teacher: bool = False,
        heldout: Iterable[Mapping[str, Tensor]] | None = None,
        samples: Callable[[Any], list[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        if objective.needs_teacher and teacher is None:
            raise ValueError(f"`teacher` is needed for the losses {', '.join(objective.losses)}.")
        if weights != "gradmag" and (isinstance(weights, str) or set(weights) != set(objective.losses)):
            raise ValueError(f"`weights` must be 'gradmag' or a number for each of {', '.join(objective.losses)}.")
        if kwargs.get("args") is not None and kwargs["args"].remove_unused_columns:
            raise ValueError("Set `remove_unused_columns=False`: batches hold more than the student's arguments.")
        self.objective, self.weights, self.samples = objective, weights, samples
        self.heldout = None if heldout is None else list(heldout)
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._last_layer = LastLayerCopy(plain) if weights == "gradmag" and len(objective.losses) > 1 else None
        kwargs.setdefault("eval_dataset", self.heldout)  # so that the Trainer knows that it may evaluate
        super().__init__(model=model, **kwargs)
        # Each micro-batch has the mean of its own losses, of which the Trainer then takes the mean.
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            if shard_teacher:
                share_out(teacher, self.args.device)
            self.teacher = teacher.to(self.args.device)
        self._teacher_bits: float | None = None
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._clock = StepClock(self.args.device)
        self.accelerator.backward = self._clock.timed("backward", self.accelerator.backward)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the batch's losses."""
        view = None
        if self.objective.needs_teacher:
            with self._clock.part("teacher"):
                view = self.objective.look(self.teacher, inputs)
        with self._clock.part("student"):
            outputs = model(**_student_inputs(inputs), use_cache=False, return_all_pred_logits=True)
        losses = self.objective(outputs.last_hidden_state, outputs.logits, inputs, view, self._average)
        weights = self._weights_of(losses, inputs, view)
        loss = weighted_loss(list(losses.values()), weights)
        for name, value in losses.items():
            self._sums[f"loss_{name}"] += value.detach().float()
        self._sums["batches"] += 1
        self._sums["bytes"] += (inputs["labels"] != IGNORED).sum()
        return (loss, outputs) if return_outputs else loss

    def _weights_of(self, losses: Mapping[str, Tensor], inputs: Mapping[str, Tensor], view: Any) -> Tensor:
        if isinstance(self.weights, Mapping):
            return torch.tensor([float(self.weights[name]) for name in losses], device=self.args.device)
        if self._last_layer is None:
            return torch.ones(len(losses), device=self.args.device)
        with torch.enable_grad():
            side = self.objective(*self._last_layer.forward(), inputs, view, self._average)
            return gradmag_weights(gradient_norms(list(side.values()), self._last_layer.parameters, self._average))

    def _average(self, local: Tensor) -> Tensor:
        return self.accelerator.reduce(local, reduction="mean")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with each loss by its name, the training's throughput, and where its time goes, as shares:
        "time_teacher", "time_student" (forward), "time_backward", "time_other"."""
        if "loss" in logs and self._sums:
            sums = {name: float(self.accelerator.reduce(value, "sum")) for name, value in sorted(self._sums.items())}
            logs |= {name: sums[name] / sums["batches"] for name in sums if name.startswith("loss_")}
            seconds, shares = self._clock.shares()
            logs["bytes_per_second"] = sums["bytes"] / seconds
            logs |= {f"time_{name}": share for name, share in shares.items()}
            self._sums.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Bits per byte of student and teacher on the held-out batches; samples go into the log."""
        began = time.perf_counter()
        if self.heldout is None:
            raise ValueError("Pass `heldout` to evaluate: batches of a `DistillationCollator`.")
        was_training = self.model.training
        self.model.eval()
        metrics = {f"{metric_key_prefix}_bits_per_byte": self._bits(self._student_nats)}
        if self.teacher is not None:
            if self._teacher_bits is None:  # frozen: it need not be measured twice
                self._teacher_bits = self._bits(self._teacher_nats)
            metrics[f"{metric_key_prefix}_teacher_bits_per_byte"] = self._teacher_bits
        if self.samples is not None:
            for line in self.samples(self.accelerator.unwrap_model(self.model)):
                self.log({"sample": line})  # type: ignore[dict-item]
        self.model.train(was_training)
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        self.log(metrics)
        self._clock.pause(time.perf_counter() - began)  # throughput is that of training
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _bits(self, nats: Callable[[Mapping[str, Tensor]], Tensor]) -> float:
        """Bits per byte over the held-out batches, whose bytes are the student's counted ids."""
        total, count = 0.0, 0
        for batch in self.heldout or ():
            moved = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            with self.compute_loss_context_manager():
                total += float(nats(moved))
            count += int((moved["labels"] != IGNORED).sum())
        return total / math.log(2) / max(count, 1)

    def _student_nats(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits = self.model(**_student_inputs(batch), use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            batch["labels"][:, 1:].flatten(),
            reduction="sum",
            ignore_index=IGNORED,
        )

    def _teacher_nats(self, batch: Mapping[str, Tensor]) -> Tensor:
        tokens = self.objective.look(self.teacher, batch).logprobs.tokens
        return -tokens[batch["teacher_labels"] != IGNORED].sum()


def _student_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


__all__ = ["DistillationTrainer"]
