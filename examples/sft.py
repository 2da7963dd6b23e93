"""Fine-tune EvaByte, or a byte-level Llama or Gemma 2, on chats; only what the assistant says is learned.

    python examples/sft.py --model EvaByte/EvaByte --data chats.jsonl --output tuned --bf16 --lora-rank 32
    accelerate launch --config-file examples/accelerate/fsdp.yaml examples/sft.py \\
        --model EvaByte/EvaByte --data chats.jsonl --output tuned --gradient-checkpointing

A line of the data is `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`.
Training is transformers' `Trainer`, or with `--trainer trl` TRL's: every option of `TrainingArguments` works as well.
The loss is the model's own, so that EvaByte learns with all its prediction heads. Chats are packed into rows of
`--max-length` ids, and none sees another: positions start again at 0 with each.

The complete model goes to `--output` (with LoRA the adapter, too), checkpoints for `--resume` go to `--output-dir`.
"""

import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import byte_llama  # noqa: F401  makes its architectures known to the Auto classes
import evabyte  # noqa: F401  likewise

IGNORED = -100  # label of what is not learned
EMPTY_CHAT = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
Chat = tuple[np.ndarray, np.ndarray]  # int16 ids and labels: byte vocabularies are small, collections of chats are not


@dataclass
class SftArguments:
    model: str = field(metadata={"help": "Folder or Hub id of the model to start from."})
    data: str = field(metadata={"help": "Chats: a .jsonl file, or NAME or NAME:SPLIT of a dataset on the Hub."})
    output: Path = field(metadata={"help": "Folder for the finished model."})
    eval_data: str | None = field(default=None, metadata={"help": "Chats to evaluate on; the loss is a mean of rows."})
    max_length: int = field(default=8192, metadata={"help": "Ids of a row; longer chats are cut there."})
    packing: bool = field(default=True, metadata={"help": "Several chats to a row."})
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA's matrices; 0 trains all weights instead."})
    lora_targets: str = field(default="all-linear", metadata={"help": "Layers that get LoRA: a pattern of names."})
    trainer: str = field(default="transformers", metadata={"help": "Whose.", "choices": ["transformers", "trl"]})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in --output-dir."})


def read_chats(source: str) -> Iterator[Any]:
    """The messages of each chat of a .jsonl file, or of a dataset on the Hub."""
    if Path(source).is_file():
        with open(source, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)["messages"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise SystemExit(f'{source}, line {number} is not an object with "messages": {error!r}') from error
        return
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SystemExit(f"there is no file {source}; for a dataset on the Hub, pip install datasets") from error
    name, _, split = source.partition(":")
    yield from load_dataset(name, split=split or "train")["messages"]


def encode(tokenizer: PreTrainedTokenizerBase, messages: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of a chat. Labelled is what the assistant says, up to and with the token that ends its turn.

    Raises:
        ValueError: the chat template writes a turn differently once others follow, so that its place is unknown.
    """
    ids = tokenizer.encode_chat(messages)  # strings such as "<|eot_id|>" in a message stay text
    labels = [IGNORED] * len(ids)
    special = set(tokenizer.all_special_ids)
    for turn in (turn for turn, message in enumerate(messages) if message["role"] == "assistant"):
        prompt = tokenizer.encode_chat(messages[:turn], add_generation_prompt=True)
        answered = tokenizer.encode_chat(messages[: turn + 1])
        start, end = len(prompt), len(answered)
        if answered[:start] != prompt or ids[:end] != answered:
            raise ValueError("the chat template writes earlier turns differently when others follow")
        # What stands behind the last special token, Gemma's newline, is between turns.
        end = next((place + 1 for place in range(end - 1, start - 1, -1) if ids[place] in special), end)
        labels[start:end] = ids[start:end]
    return ids, labels


def encode_all(tokenizer: PreTrainedTokenizerBase, chats: Iterable[Any], max_length: int, name: str) -> list[Chat]:
    """The chats from which there is something to learn, none longer than `max_length`."""
    encoded, cut, number = [], 0, 0
    for number, messages in enumerate(chats, 1):
        try:
            ids, labels = encode(tokenizer, messages)
        except (TypeError, ValueError, KeyError, TemplateError) as error:
            raise SystemExit(f"{name}, chat {number}: {error}") from error
        cut += len(ids) > max_length
        chat = np.array(ids[:max_length], np.int16), np.array(labels[:max_length], np.int16)
        if (chat[1] != IGNORED).any():
            encoded.append(chat)
    print(f"{name}: {len(encoded)} chats, {cut} cut to --max-length; {number - len(encoded)} left out, unanswered")
    if not encoded:
        raise SystemExit(f"{name} has no chat in which an assistant says something within --max-length {max_length}")
    return encoded


def pack(chats: Sequence[Chat], max_length: int) -> list[list[Chat]]:
    """Rows of chats, at most `max_length` ids together: the longest first, each into the emptiest row if it fits."""
    rows: list[tuple[int, int, list[Chat]]] = []  # a heap of (ids in the row, number of the row, the row)
    for chat in sorted(chats, key=lambda chat: len(chat[0]), reverse=True):
        if rows and rows[0][0] + len(chat[0]) <= max_length:
            filled, number, row = heapq.heappop(rows)
        else:
            filled, number, row = 0, len(rows), []
        heapq.heappush(rows, (filled + len(chat[0]), number, [*row, chat]))
    return [row for _, _, row in rows]


def load_rows(tokenizer: PreTrainedTokenizerBase, options: SftArguments, source: str) -> list[dict]:
    """Rows for `collate`: of each, the ids and the labels of its chats."""
    chats = encode_all(tokenizer, read_chats(source), options.max_length, source)
    rows = pack(chats, options.max_length) if options.packing else [[chat] for chat in chats]
    return [{"input_ids": [ids for ids, _ in row], "labels": [labels for _, labels in row]} for row in rows]


def collate(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Join all chats of a batch into one row, without padding; positions start again at 0 with each.

    One row rather than a batch of them: FlashAttention takes documents apart in single rows only.
    """
    pairs = [pair for row in rows for pair in zip(row["input_ids"], row["labels"], strict=True)]
    return DataCollatorWithFlattening()([{"input_ids": ids, "labels": labels} for ids, labels in pairs])


def load_model(options: SftArguments, arguments: TrainingArguments) -> torch.nn.Module:
    """The model, with an adapter if LoRA is asked for."""
    # Weights that learn are float32 also under --bf16, which then is for computing: small steps would be lost.
    frozen = options.lora_rank and arguments.bf16
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if frozen else torch.float32)
    if options.lora_rank:
        from peft import LoraConfig, get_peft_model

        sizes = {"r": options.lora_rank, "lora_alpha": 2 * options.lora_rank}
        return get_peft_model(model, LoraConfig(**sizes, target_modules=options.lora_targets, task_type="CAUSAL_LM"))
    if getattr(model.config, "expand_input_ids", False):
        model.model.expand_embed_tokens.requires_grad_(False)  # as published: few subwords occur often enough to learn
    return model


def make_trainer(options: SftArguments, arguments: TrainingArguments, **parts: Any) -> Trainer:
    if options.trainer == "transformers":
        return Trainer(args=arguments, data_collator=collate, **parts)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class ModelsOwnLoss(SFTTrainer):
        """TRL's loss takes the output layer for one next-token head: EvaByte's heads would be one large vocabulary."""

        compute_loss = Trainer.compute_loss

    given = {each.name: getattr(arguments, each.name) for each in fields(arguments) if each.init}
    config = SFTConfig(**given, dataset_kwargs={"skip_prepare_dataset": True})
    for name in ("train_dataset", "eval_dataset"):
        parts[name] = parts[name] and Dataset.from_list(parts[name])
    return ModelsOwnLoss(args=config, data_collator=collate, **parts)


def save(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, options: SftArguments) -> None:
    """Write the complete model, in the dtype that it came in; it ends its answers as the chats do."""
    # All processes take part: sharded weights have to be gathered.
    if options.lora_rank:
        trainer.save_model(options.output / "adapter")
    else:
        weights = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return
    model = AutoModelForCausalLM.from_pretrained(options.model)
    if options.lora_rank:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, options.output / "adapter").merge_and_unload()
    else:
        model.load_state_dict(weights)
    known = model.generation_config.eos_token_id
    ends = {*(known if isinstance(known, list) else [known]), *encode(tokenizer, EMPTY_CHAT)[1]}
    model.generation_config.eos_token_id = sorted(ends - {None, IGNORED})
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


def parse_arguments(words: Sequence[str] | None = None) -> tuple[SftArguments, TrainingArguments]:
    parser = HfArgumentParser((SftArguments, TrainingArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(
        output_dir="runs/sft",
        learning_rate=3e-5,  # EvaByte-SFT's, as the schedule is; LoRA usually wants about ten times as much
        lr_scheduler_type="cosine",
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        num_train_epochs=1,
        label_names=["labels"],  # `Trainer` would look for `shift_labels` too, and without them report no loss
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
    )
    options, arguments = parser.parse_args_into_dataclasses(words)
    if arguments.label_smoothing_factor:
        parser.error(
            "--label-smoothing-factor: for classes that are not its own transformers forgets to shift the labels, and "
            "the model would learn to repeat each byte; leave it out"
        )
    if options.output.is_dir() and any(options.output.iterdir()):
        parser.error(f"--output {options.output} is not empty: name another folder")
    if arguments.eval_strategy != "no" and options.eval_data is None:
        parser.error("--eval-strategy needs --eval-data")
    if options.resume and not any(Path(arguments.output_dir).glob("checkpoint-*")):
        parser.error(f"--resume: there is no checkpoint in {arguments.output_dir}; leave it out to start anew")
    return options, arguments


def main(words: Sequence[str] | None = None) -> Trainer:
    options, arguments = parse_arguments(words)
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    evaluation = load_rows(tokenizer, options, options.eval_data) if options.eval_data else None
    trainer = make_trainer(
        options,
        arguments,
        model=load_model(options, arguments),
        train_dataset=load_rows(tokenizer, options, options.data),
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    if evaluation:
        trainer.log_metrics("eval", trainer.evaluate())
    save(trainer, tokenizer, options)
    return trainer


if __name__ == "__main__":
    main()
