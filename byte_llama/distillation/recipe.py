"""A distillation run as a file: which models, which text, which losses, and the Trainer's own arguments."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import patch_environment
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.trainer_utils import align_special_tokens

from .collation import DistillationCollator
from .data import DistillationDataset, read_documents
from .encoding import ParallelEncoder
from .objective import LOSSES, Objective
from .spelling import space_mask
from .trainer import DistillationTrainer


@dataclass(frozen=True)
class Recipe:
    """What `distill` needs to know; every field can stand in a YAML file.

    Attributes:
        student: folder or Hub id of a byte-level model, as `byte-llama convert` writes it.
        teacher: folder or Hub id of the subword model; `teacher_gguf_file`, the file in it when it is a GGUF one.
        output: folder for checkpoints and the trained student (`output/final`).
        train: text or jsonl files (`read_documents` says which), patterns allowed.
        heldout: files for bits per byte, never trained on; the first `heldout_documents` documents count.
        document_bytes: plain texts are cut at lines into documents of at most so many bytes.
        student_length, teacher_length: ids at which sequences are cut, and to which batches are padded.
        packed: join documents to rows of full length.
        train_on: "all", "completions" or "last_turn".
        losses: names among `LOSSES`; weights: "gradmag" or a number for each by name.
        eva_layers, eva_window_size, eva_chunk_size: give these layers of the student ("all", or their numbers) EVA
            attention; the teacher keeps its own, so that "latents" has full attention's states as its target.
        num_pred_heads, head_kind: heads to add to a student that has none; freeze_trunk: train them alone.
        lora: None, or arguments of peft's `LoraConfig`; the adapter is merged into `output/final`.
        teacher_dtype: the frozen teacher's; shard_teacher: each process holds its share of the teacher's layers.
        sample_prompts: texts that every evaluation continues, `sample_bytes` bytes each.
        training: of transformers' `TrainingArguments`.

    Raises:
        ValueError: for names that a recipe does not have, and values that cannot be.
    """

    student: str
    teacher: str
    output: str
    train: list[str]
    heldout: list[str]
    teacher_gguf_file: str | None = None
    heldout_documents: int = 64
    document_bytes: int = 1500
    student_length: int = 2048
    teacher_length: int = 512
    packed: bool = False
    train_on: str = "all"
    losses: tuple[str, ...] = ("sft", "alm", "latents")
    weights: str | Mapping[str, float] = "gradmag"
    eva_layers: str | Sequence[int] | None = None
    eva_window_size: int | None = None
    eva_chunk_size: int | None = None
    num_pred_heads: int = 1
    head_kind: str = "residual"
    freeze_trunk: bool = False
    lora: Mapping[str, Any] | None = None
    teacher_dtype: str = "bfloat16"
    shard_teacher: bool = False
    sample_prompts: tuple[str, ...] = ()
    sample_bytes: int = 64
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [name for name in self.losses if name not in LOSSES]
        if unknown:
            raise ValueError(f"`losses` has {', '.join(unknown)}; there are {', '.join(LOSSES)}.")
        if self.freeze_trunk and set(self.losses) != {"heads"}:
            raise ValueError("With `freeze_trunk` only the heads learn: `losses` must be ['heads'].")
        if self.freeze_trunk and self.lora:
            raise ValueError("`freeze_trunk` and `lora` exclude each other.")
        if "max_steps" not in self.training:
            raise ValueError("`training` needs `max_steps`: the text is a stream, without a known length.")
        if not hasattr(torch, self.teacher_dtype):
            raise ValueError(f"`teacher_dtype` is no dtype: {self.teacher_dtype!r}.")

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> "Recipe":
        """Read a YAML file; `overrides` replace its fields."""
        with open(path, encoding="utf-8") as file:
            given = yaml.safe_load(file)
        if not isinstance(given, dict):
            raise ValueError(f"{path} is no recipe: it must hold `name: value` lines.")
        return cls.from_dict({**given, **overrides})

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Recipe":
        known = {part.name for part in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"A recipe has no {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
        required = ("student", "teacher", "output", "train", "heldout")
        if missing := [name for name in required if not given.get(name)]:
            raise ValueError(f"The recipe lacks {', '.join(missing)}.")
        lists = {name: [given[name]] for name in ("train", "heldout") if isinstance(given[name], str)}
        tuples = {name: tuple(given[name]) for name in ("losses", "sample_prompts") if name in given}
        return cls(**{**given, **lists, **tuples})


def make_trainer(recipe: Recipe) -> DistillationTrainer:
    """Load what the recipe names and put it together; nothing runs yet."""
    ours = {"output_dir": recipe.output, "remove_unused_columns": False}
    args = TrainingArguments(**{"report_to": [], "eval_on_start": True, **recipe.training, **ours})
    set_seed(args.seed)  # what is new in the student is the same on all devices, which hold a shard each
    student = _load_student(recipe)
    byte_tokenizer = AutoTokenizer.from_pretrained(recipe.student)
    gguf = {} if recipe.teacher_gguf_file is None else {"gguf_file": recipe.teacher_gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(recipe.teacher, **gguf)
    dtype = getattr(torch, recipe.teacher_dtype)
    teacher = None
    objective = Objective(
        recipe.losses,
        student_spaces=space_mask(byte_tokenizer, vocab_size=student.config.vocab_size),
        teacher_spaces=space_mask(tokenizer) if "alm" in recipe.losses else None,
    )
    if objective.needs_teacher:
        # Under FSDP accelerate may have only the first process read weights; the teacher is whole on all of them.
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
            teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher, dtype=dtype, **gguf)
        spaces = space_mask(tokenizer, vocab_size=teacher.get_output_embeddings().weight.shape[0])
        objective = Objective(recipe.losses, objective.student_spaces, spaces)

    encoder = ParallelEncoder(
        byte_tokenizer,
        tokenizer if teacher is not None else None,
        max_student_length=recipe.student_length,
        max_teacher_length=recipe.teacher_length,
        train_on=recipe.train_on,  # type: ignore[arg-type]
    )
    read = functools.partial(read_documents, recipe.train, recipe.document_bytes)
    # Fixed lengths: devices share batches, which must have one shape for that.
    fixed = (recipe.student_length, recipe.teacher_length)
    collator = DistillationCollator.from_tokenizers(byte_tokenizer, tokenizer, *fixed, packed=recipe.packed)
    loose = DistillationCollator.from_tokenizers(byte_tokenizer, tokenizer)
    documents = islice(read_documents(recipe.heldout, recipe.document_bytes), recipe.heldout_documents)
    heldout, size = encoder(list(documents)), args.per_device_eval_batch_size
    return DistillationTrainer(
        student,
        teacher,
        objective,
        weights=recipe.weights,
        shard_teacher=recipe.shard_teacher,
        heldout=[loose(heldout[begin : begin + size]) for begin in range(0, len(heldout), size)],
        samples=_sampler(byte_tokenizer, recipe.sample_prompts, recipe.sample_bytes),
        args=args,
        train_dataset=DistillationDataset(read, encoder, shuffle_buffer=1024, seed=args.seed, packed=recipe.packed),
        data_collator=collator,
        processing_class=byte_tokenizer,
    )


def distill(recipe: Recipe, resume: bool = False) -> DistillationTrainer:
    """Train as the recipe says, and write the student to `output/final`, with its tokenizer and code.

    Args:
        resume: go on from the last checkpoint in `output`.
    """
    trainer = make_trainer(recipe)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.evaluate()
    weights = trainer.accelerator.get_state_dict(trainer.model)  # shards are gathered, by all processes together
    if trainer.is_world_process_zero():
        # Neither adapters nor code can be saved from a sharded model, whose layers and class are FSDP's.
        student = _load_student(recipe)
        student.load_state_dict(weights)
        final = Path(recipe.output) / "final"
        student = student.merge_and_unload() if recipe.lora else student
        align_special_tokens(student, trainer.processing_class)  # as the Trainer did with the one it trained
        student.save_pretrained(final)
        trainer.processing_class.save_pretrained(final)
    trainer.save_state()
    return trainer


def _load_student(recipe: Recipe) -> Any:
    """With new heads where wanted; what does not learn is frozen: the subwords' embeddings, or all but the heads."""
    eva = {name: getattr(recipe, name) for name in ("eva_layers", "eva_window_size", "eva_chunk_size")}
    eva = {name: value for name, value in eva.items() if value is not None}
    if eva and not hasattr(AutoConfig.from_pretrained(recipe.student), "eva_layers"):
        raise ValueError(f"`eva_layers` go with a byte-level Llama as the student, which {recipe.student} is not.")
    student = AutoModelForCausalLM.from_pretrained(recipe.student, dtype=torch.float32, **eva)
    for module in student.modules():
        # Under FSDP what a checkpoint lacks is initialised by the first process alone, and is to be sent to the others;
        # but accelerate tells parameters apart by their memory, of which these would have none.
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=student.lm_head.weight.device, recurse=False)
    if recipe.num_pred_heads > 1 and len(student.draft_heads) + 1 != recipe.num_pred_heads:
        student.add_prediction_heads(recipe.num_pred_heads, recipe.head_kind)
    if recipe.freeze_trunk:
        student.freeze_trunk()
    elif student.config.expand_input_ids:
        student.model.expand_embed_tokens.requires_grad_(False)
    return _with_lora(student, recipe.lora) if recipe.lora else student


def _with_lora(student: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("`lora` needs peft: pip install 'evabyte[train]'.") from error
    heads = [f"draft_heads.{number}" for number in range(len(student.draft_heads))]
    summaries = ["summary"] if getattr(student.config, "eva_layers", None) is not None else []  # of EVA layers
    learned = ["embed_tokens", "lm_head", *heads, *summaries]
    defaults: dict[str, Any] = {"target_modules": "all-linear", "modules_to_save": learned}
    return get_peft_model(student, LoraConfig(**{**defaults, **arguments}))


def _sampler(tokenizer: Any, prompts: Sequence[str], new_bytes: int) -> Callable[[Any], list[str]] | None:
    if not prompts:
        return None

    def samples(model: Any) -> list[str]:
        lines = []
        for prompt in prompts:
            ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
            written = model.generate(
                ids,
                max_new_tokens=new_bytes,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                synced_gpus=isinstance(model, FSDPModule),  # shards are gathered by all processes or none
            )
            lines.append(tokenizer.decode(written[0], skip_special_tokens=True))
        return lines

    return samples


__all__ = ["Recipe", "distill", "make_trainer"]
