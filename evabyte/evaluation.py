"""Evaluation with lm-evaluation-harness (`pip install 'evabyte[eval]'`), by what its numbers mean for bytes.

The harness counts lengths in tokens and puts the space between a question and its answer in front of the answer, as
subword tokenizers want it. A byte-level model needs lengths about four times as large, and the space where a person
types it: at the end of the prompt, so that only the answer itself is scored.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

# The tasks of the published models' cards.
CARD = ("mmlu", "boolq", "piqa", "ifeval", "arc_challenge")
BYTES_PER_TOKEN = 4  # of English text, about; lengths in the harness's tasks are in tokens
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # as the harness's tasks name them


class ByteHFLM(HFLM):
    """The harness's `hf` model for a byte-level model: an instance is what its functions take as `model`.

    Args:
        pretrained: the model.
        tokenizer: its tokenizer, with an `encode_bytes`.
        multibyte: generate by multibyte decoding, which changes the time and not the text. Default: if the model has
            several prediction heads.
        kwargs: as `HFLM` takes them: `batch_size`, `max_length`, ...
    """

    def __init__(self, pretrained: Any, tokenizer: Any, multibyte: bool | None = None, **kwargs: Any) -> None:
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, backend="causal", **kwargs)
        self.add_bos_token: bool | None = kwargs.get("add_bos_token")
        self.multibyte = getattr(pretrained.config, "num_pred_heads", 1) > 1 if multibyte is None else multibyte

    @property
    def max_gen_toks(self) -> int:
        """Bytes to generate where a task does not say."""
        return BYTES_PER_TOKEN * super().max_gen_toks

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As in the harness, with the tasks' lengths in tokens turned into bytes."""
        in_bytes = []
        for request in requests:
            context, options = request.args
            lengths = {name: BYTES_PER_TOKEN * options[name] for name in LENGTHS if options.get(name) is not None}
            in_bytes.append(dataclasses.replace(request, arguments=(context, {**options, **lengths})))
        return super().generate_until(in_bytes, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As in the harness, but for the beginning-of-text token: it is read before each text, and never predicted."""
        as_given = self.add_bos_token
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.add_bos_token = as_given

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of an answer; the space between them is the prompt's.

        They are encoded apart, so that the answer is all of its bytes, whatever a tokenizer makes of the seam.
        """
        answer = continuation.lstrip() or continuation
        prompt = context + continuation[: len(continuation) - len(answer)]
        return self.tok_encode(prompt), self.tok_encode(answer, add_special_tokens=False)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """Generate until each row's own stop; the harness itself goes on until every row of a batch has stopped."""
        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        if not kwargs.get("temperature") and not kwargs.get("do_sample"):
            kwargs.pop("temperature", None)
            kwargs["do_sample"] = False
        if self.multibyte:
            kwargs.setdefault("multibyte", True)
        strings = [text for text in stop if text and text != self.tokenizer.eos_token]
        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stop_strings=strings or None,
                tokenizer=self.tokenizer,
                eos_token_id=sorted(ends) or None,
                pad_token_id=self.tokenizer.pad_token_id,
                **kwargs,
            )


def harness_model(model: Any, tokenizer: Any, batch_size: int = 1, multibyte: bool | None = None) -> Any:
    """What the harness's functions take as `model`: a [`ByteHFLM`], or the harness's own for a subword tokenizer."""
    if hasattr(tokenizer, "encode_bytes"):
        return ByteHFLM(model, tokenizer, multibyte=multibyte, batch_size=batch_size)
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def find_tasks(names: Sequence[str], include_path: Sequence[str | Path] = ()) -> TaskManager:
    """The harness's index of tasks, which knows all of `names` (task names, groups, or patterns of them).

    Args:
        include_path: folders with further task files.

    Raises:
        ValueError: there is no such task.
    """
    folders = [str(folder) for folder in include_path]
    manager = TaskManager(include_path=folders, include_defaults=False)
    # The harness's own tasks are thousands of files, which take seconds to index.
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=folders)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"`tasks`: there is no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    return manager


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = CARD,
    include_path: Sequence[str | Path] = (),
    batch_size: int = 1,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    multibyte: bool | None = None,
) -> dict[str, Any]:
    """Evaluate a causal language model, byte-level or subword, on tasks of lm-evaluation-harness.

    Args:
        model: a model such as `AutoModelForCausalLM` loads.
        tokenizer: its tokenizer.
        tasks: names of tasks and groups; by default those of the published models' cards.
        include_path: folders with task files of one's own.
        batch_size: sequences in one forward.
        limit: examples of each task, for a try.
        num_fewshot: examples with answers before each question, where the task does not fix it.
        chat: put the questions into the tokenizer's chat template.
        multibyte: as in [`ByteHFLM`].

    Returns:
        what `lm_eval.simple_evaluate` returns: `["results"][task]["metric,filter"]` are the scores.

    Raises:
        ValueError: there is no such task.
    """
    manager = find_tasks(tasks, include_path)
    return lm_eval.simple_evaluate(
        model=harness_model(model, tokenizer, batch_size, multibyte),
        tasks=manager.match_tasks(list(tasks)),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=chat,
        log_samples=False,
        bootstrap_iters=1000,
    )


def score_table(results: dict[str, Any], tasks: Sequence[str]) -> str:
    """A Markdown table for a model card: a row for every metric of the tasks, of `evaluate`'s results."""
    rows = ["| task | shots | metric | score | ± |", "| --- | ---: | --- | ---: | ---: |"]
    for task in tasks:
        scores = results["results"][task]
        for key, value in scores.items():
            metric, _, how = key.partition(",")
            if not isinstance(value, (int, float)) or not how or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{how}")
            spread = f"{error:.4f}" if isinstance(error, float) else ""
            name = metric if how == "none" else f"{metric} ({how})"
            rows.append(f"| {task} | {results['n-shot'].get(task, '')} | {name} | {value:.4f} | {spread} |")
    return "\n".join(rows)


__all__ = ["CARD", "ByteHFLM", "evaluate", "find_tasks", "harness_model", "score_table"]
