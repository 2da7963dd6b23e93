"""Pretrain an EvaByte from scratch, or go on from a checkpoint, on the corpus of `prepare_corpus.py`.

    python examples/prepare_corpus.py
    export OMP_WAIT_POLICY=PASSIVE      # on a shared CPU: waiting threads must not spin (steps took five times longer)
    python examples/pretrain.py --bf16 --threads 2 --max-seconds 3600
    python examples/pretrain.py --bf16 --threads 2 --max-seconds 3600 --resume      # after an interruption
    accelerate launch examples/pretrain.py --bf16 --max-seconds 3600                # several devices

Training is transformers' `Trainer`: every option of `TrainingArguments` works as well. Two things are added. The loss
weighs the prediction heads, w_h proportional to `--head-decay` ** h. And with `--max-seconds` the learning rate follows
the clock, so that a run on a busy machine ends on time with its decay complete; the full evaluation comes after that.

Writes to `--output`: the model in bfloat16 with its tokenizer, `training_log.json` (provenance, curve, final held-out
bits per byte beside those of `xz -9e`) and `loss_curve.png`. Checkpoints to resume from go to `--output-dir`.
"""

import ctypes
import json
import lzma
import math
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import torch
import transformers
from muon import MuonWithAdamW
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from evabyte import EvaByteConfig, EvaByteForCausalLM, EvaByteTokenizer

PAD, BOS, EOS, FIRST_BYTE = 0, 1, 2, 64  # token ids; byte b is FIRST_BYTE + b
IGNORED = -100  # label that no head learns


@dataclass
class PretrainArguments:
    data: Path = field(default=Path("data"), metadata={"help": "Folder written by prepare_corpus.py."})
    output: Path = field(default=Path("runs/pretrain/final"), metadata={"help": "Folder for the finished model."})
    init_from: str | None = field(default=None, metadata={"help": "Checkpoint to start from instead of from scratch."})
    resume: bool = field(default=False, metadata={"help": "Continue from the last checkpoint in --output-dir."})
    layers: int = field(default=4, metadata={"help": "Number of decoder layers."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the model."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the MLP; default 8/3 as wide."})
    heads: int = field(default=4, metadata={"help": "Number of attention heads."})
    window_size: int = field(default=512, metadata={"help": "Bytes of a window, attended to exactly."})
    chunk_size: int = field(default=16, metadata={"help": "Bytes of a chunk, summarised once its window is closed."})
    pred_heads: int = field(default=8, metadata={"help": "Prediction heads; head h predicts the byte at t + 1 + h."})
    context: int = field(default=2048, metadata={"help": "Tokens of a training row, and of an evaluation row."})
    init_std: float = field(default=0.05, metadata={"help": "Standard deviation of the initial weights."})
    optimizer: str = field(
        default="muon",
        metadata={"help": "Muon for the matrices and AdamW for the rest, or AdamW.", "choices": ["muon", "adamw"]},
    )
    matrix_learning_rate: float = field(default=0.02, metadata={"help": "Peak learning rate of Muon's matrices."})
    head_decay: float = field(default=0.7, metadata={"help": "Ratio between the loss weights of consecutive heads."})
    schedule: str = field(
        default="cosine", metadata={"help": "Learning rate after warm-up.", "choices": ["cosine", "wsd"]}
    )
    decay_fraction: float = field(default=0.2, metadata={"help": "Last part of a wsd run, in which the rate decays."})
    final_lr_fraction: float = field(default=0.05, metadata={"help": "Learning rate at the end, relative to the peak."})
    max_seconds: float = field(default=math.inf, metadata={"help": "Wall-clock budget of training, over all resumes."})
    eval_seconds: float = field(default=300, metadata={"help": "Evaluate and save every so many seconds."})
    eval_bytes: int = field(default=32768, metadata={"help": "Held-out bytes per source for evaluation in training."})
    final_eval_bytes: int = field(default=300_000, metadata={"help": "The same for the full evaluation at the end."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; one per idle core is best."})


class PackedDocuments(torch.utils.data.Dataset):
    """Rows of `context` tokens cut from one stream of shuffled documents, each `bos + bytes + eos`.

    Positions restart at every document and at the start of every row. The row shuffling of `Trainer` comes on top, so
    the order depends on the seed alone and a resumed run goes on where it stopped.
    """

    def __init__(self, data: Path, context: int, seed: int) -> None:
        if not (data / "train.bin").exists():
            raise SystemExit(f"--data: there is no train.bin in {data}; run examples/prepare_corpus.py first")
        self.context = context
        self.bytes = np.memmap(data / "train.bin", dtype=np.uint8, mode="r")
        offsets = np.load(data / "train_offsets.npy")
        self.documents = np.stack([offsets[:-1], offsets[1:]], axis=1)  # [documents, 2]: first byte, one past the last
        self.documents = np.random.default_rng(seed).permutation(self.documents)
        self.stream_ends = np.cumsum(self.documents[:, 1] - self.documents[:, 0] + 2)
        if len(self) == 0:
            raise SystemExit(f"--context {context} is longer than the whole corpus; choose a smaller one")

    def __len__(self) -> int:
        return int(self.stream_ends[-1]) // self.context

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        begin = index * self.context
        document = int(np.searchsorted(self.stream_ends, begin, side="right"))
        skipped = begin - (int(self.stream_ends[document - 1]) if document else 0)
        pieces, missing = [], self.context
        while missing:
            first, end = self.documents[document]
            tokens = np.concatenate([[BOS], self.bytes[first:end].astype(np.int64) + FIRST_BYTE, [EOS]])
            pieces.append(tokens[skipped : skipped + missing])
            missing -= len(pieces[-1])
            document, skipped = document + 1, 0
        input_ids = torch.from_numpy(np.concatenate(pieces))
        position_ids = torch.cat([torch.arange(len(piece)) for piece in pieces])
        labels = input_ids.masked_fill(input_ids == BOS, IGNORED)  # a new document cannot be foreseen
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


class HeldOutText(NamedTuple):
    text: bytes
    compressed: int  # bytes that `xz -9e` makes of `text`

    @classmethod
    def read(cls, path: Path, limit: int) -> "HeldOutText":
        text = path.read_bytes()[:limit]
        return cls(text, len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)))

    @property
    def xz_bits_per_byte(self) -> float:
        return 8 * self.compressed / len(self.text)

    def rows(self, context: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Overlapping rows whose labels cover every byte once: `input_ids` and `labels`, both [rows, context].

        A row starts `stride` tokens after the one before and is scored on its last `stride` tokens only, the first
        row on all of them: there, the first byte is predicted from bos.
        """
        tokens = torch.tensor([BOS, *(FIRST_BYTE + byte for byte in self.text)])
        starts = range(0, max(len(tokens) - context, 0) + stride, stride)
        input_ids = torch.full((len(starts), context), PAD)
        labels = torch.full((len(starts), context), IGNORED)
        for row, start in enumerate(starts):
            piece = tokens[start : start + context]
            scored_from = context - stride if row else 1
            input_ids[row, : len(piece)] = piece
            labels[row, scored_from : len(piece)] = piece[scored_from:]
        return input_ids, labels


class WallClock(TrainerCallback):
    """Training time in seconds, resumed runs included; ends the run on time, evaluates and saves at intervals."""

    def __init__(self, max_seconds: float, eval_seconds: float) -> None:
        self.max_seconds = max_seconds
        self.eval_seconds = eval_seconds
        self.seconds = 0.0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = state.log_history[-1]["seconds"] if state.log_history else 0.0
        self.began = time.monotonic() - self.seconds
        self.evaluated = self.seconds

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        seconds = torch.tensor([now - self.began, now - self.step_began], dtype=torch.float32, device=args.device)
        # every process must take the same decisions
        self.seconds, step_seconds = accelerate.utils.broadcast(seconds).tolist()
        if self.seconds - self.evaluated >= self.eval_seconds:
            self.evaluated = self.seconds
            control.should_evaluate = control.should_log = control.should_save = True
        if self.seconds + step_seconds > self.max_seconds:
            control.should_training_stop = control.should_log = control.should_save = True
            control.should_evaluate = False  # the full evaluation follows


class BytePretrainer(Trainer):
    """`Trainer` with weighted prediction heads, a learning rate that follows the clock, and bits per byte."""

    def __init__(self, *args: Any, options: PretrainArguments, heldout: dict[str, HeldOutText], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = options
        self.heldout = heldout
        self.model_accepts_loss_kwargs = False  # compute_loss returns a mean: divide it by the accumulation steps
        self.clock = WallClock(options.max_seconds, options.eval_seconds)
        self.add_callback(self.clock)
        weights = options.head_decay ** torch.arange(self.model.config.num_pred_heads, dtype=torch.float32)
        self.head_weights = (weights / weights.sum()).to(self.args.device)
        self.next_byte_losses: list[torch.Tensor] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        self.next_byte_losses.append(outputs.head_losses[0].detach())
        loss = (self.head_weights * outputs.head_losses).sum()
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.options.optimizer == "muon":
            decoder = {name: p for name, p in self.model.named_parameters() if ".layers." in name and p.ndim == 2}
            self.optimizer = MuonWithAdamW(
                decoder.values(),
                (p for name, p in self.model.named_parameters() if name not in decoder),
                matrix_learning_rate=self.options.matrix_learning_rate,
                learning_rate=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                weight_decay=self.args.weight_decay,
            )
        return super().create_optimizer(model)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Weight matrices decay; norms, embeddings and the adaptive vectors of EVA do not."""
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and "adaptive_" not in name and id(parameter) not in embeddings
        ]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        options, warmup_steps = self.options, self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            """Learning rate relative to its peak, at the share of the run (time or steps) that is over."""
            progress = min(max(self.clock.seconds / options.max_seconds, step / num_training_steps), 1.0)
            if options.schedule == "cosine":
                shape = (1 + math.cos(math.pi * progress)) / 2
            else:
                shape = min((1 - progress) / options.decay_fraction, 1.0)
            warmup = min((step + 1) / max(warmup_steps, 1), 1.0)
            return warmup * (options.final_lr_fraction + (1 - options.final_lr_fraction) * shape)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.next_byte_losses and "loss" in logs:
            logs["train_bpb"] = round(torch.stack(self.next_byte_losses).mean().item() / math.log(2), 4)
            self.next_byte_losses.clear()
        tokens_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        logs["seconds"] = round(self.clock.seconds, 1)
        logs["bytes_seen"] = self.state.global_step * tokens_per_step * self.options.context
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Called by `Trainer` during training: next-byte bits per byte of a part of each source."""
        stride = self.options.context - len(self.head_weights)
        max_rows = max(self.options.eval_bytes // self.options.context, 1)
        metrics = {
            f"eval_{name}_bpb": round(self.bits_per_byte(source, stride, max_rows)[0], 4)
            for name, source in self.heldout.items()
        }
        self.log(metrics)
        return metrics

    @torch.no_grad()
    def bits_per_byte(self, source: HeldOutText, stride: int, max_rows: int | None = None) -> list[float]:
        """Mean of -log2 p(byte) of every prediction head, over the whole text or `max_rows` rows spread over it."""
        input_ids, labels = source.rows(self.options.context, stride)
        if max_rows is not None and max_rows < len(input_ids):
            chosen = torch.linspace(0, len(input_ids) - 1, max_rows).long()
            input_ids, labels = input_ids[chosen], labels[chosen]
        rank, world_size, batch_size = self.args.process_index, self.args.world_size, self.args.eval_batch_size
        nats, counts = torch.zeros(2, len(self.head_weights), dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for begin in range(rank * batch_size, len(input_ids), world_size * batch_size):
            batch = labels[begin : begin + batch_size].to(self.args.device)
            with self.accelerator.autocast():
                outputs = self.model(input_ids=input_ids[begin : begin + batch_size].to(batch.device), labels=batch)
            scored = torch.stack([(batch[:, 1 + head :] != IGNORED).sum() for head in range(len(counts))])
            nats += torch.where(scored > 0, outputs.head_losses.double() * scored, 0.0)
            counts += scored
        nats, counts = (accelerate.utils.reduce(total, "sum") for total in (nats, counts))
        return (nats / counts / math.log(2)).tolist()


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step: handing it back and faulting it in again takes longer than the
    computation of a small model on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # parameter numbers of malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def new_model(options: PretrainArguments) -> EvaByteForCausalLM:
    if options.init_from is not None:
        return EvaByteForCausalLM.from_pretrained(options.init_from, dtype=torch.float32)
    config = EvaByteConfig(
        vocab_size=320,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size or math.ceil(options.hidden_size * 8 / 3 / 64) * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        window_size=options.window_size,
        chunk_size=options.chunk_size,
        num_pred_heads=options.pred_heads,
        max_position_embeddings=32768,
        initializer_range=options.init_std,
        rope_theta=100000.0,
    )
    return EvaByteForCausalLM(config)


def provenance(options: PretrainArguments, arguments: TrainingArguments, model: EvaByteForCausalLM) -> dict[str, Any]:
    """What is needed to run this again: code, versions, command line, seed, data."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "git_commit": commit or "unknown",
        "command": ["python", "examples/pretrain.py", *sys.argv[1:]],
        "seed": arguments.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": f"{arguments.world_size} x {arguments.device.type}, {torch.get_num_threads()} CPU threads",
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: str(module.__version__) for module in (torch, transformers, accelerate, np)},
        },
        "data": json.loads((options.data / "manifest.json").read_text(encoding="utf-8")),
    }


def plot_curve(curve: list[dict[str, float]], heldout: dict[str, HeldOutText], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    trained = [entry for entry in curve if "train_bpb" in entry]
    axes.plot([e["bytes_seen"] / 1e6 for e in trained], [e["train_bpb"] for e in trained], "0.7", label="training")
    for name, source in heldout.items():
        key = f"eval_{name}_bpb"
        points = [(entry["bytes_seen"] / 1e6, entry[key]) for entry in curve if key in entry]
        if points:
            label = f"{name}: {points[-1][1]:.2f} (xz -9e: {source.xz_bits_per_byte:.2f})"
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.set(xlabel="training bytes seen (MB)", ylabel="next-byte bits per byte")
    axes.set_ylim(top=min(axes.get_ylim()[1], 5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def full_evaluation(trainer: BytePretrainer) -> dict[str, dict[str, Any]]:
    """Bits per byte of every source, each byte with at least half a row of context (but for the first half row)."""
    results = {}
    for name, source in trainer.heldout.items():
        per_head = [round(bits, 4) for bits in trainer.bits_per_byte(source, stride=trainer.options.context // 2)]
        results[name] = {
            "bytes": len(source.text),
            "bits_per_byte": per_head[0],
            "xz_9e_bits_per_byte": round(source.xz_bits_per_byte, 4),
            "bits_per_byte_of_each_head": per_head,
        }
        if trainer.is_world_process_zero():
            print(f"{name:10} {per_head[0]:.4f} bits per byte; xz -9e {source.xz_bits_per_byte:.4f}", flush=True)
    return results


def parse_arguments() -> tuple[PretrainArguments, TrainingArguments]:
    parser = HfArgumentParser((PretrainArguments, TrainingArguments), description=__doc__)
    parser.add_argument("--compile", dest="torch_compile", action="store_true", help="Short for --torch-compile.")
    parser.add_argument("--batch-size", dest="per_device_train_batch_size", type=int, help="Rows per device and step.")
    parser.set_defaults(
        output_dir="runs/pretrain",
        per_device_train_batch_size=4,
        learning_rate=4e-3,
        warmup_steps=50,
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=0.1,
        max_grad_norm=1.0,
        num_train_epochs=1,
        logging_steps=10,
        save_strategy="no",  # WallClock saves
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
    )
    options, arguments = parser.parse_args_into_dataclasses()
    if options.context <= 2 * options.pred_heads:
        parser.error(f"--context must be more than twice --pred-heads, got {options.context} and {options.pred_heads}")
    return options, arguments


def main() -> None:
    options, arguments = parse_arguments()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    heldout = {
        path.stem: HeldOutText.read(path, options.final_eval_bytes)
        for path in sorted(options.data.glob("heldout/*.txt"))
    }
    transformers.set_seed(arguments.seed)
    trainer = BytePretrainer(
        model=new_model(options),
        args=arguments,
        train_dataset=PackedDocuments(options.data, options.context, arguments.seed),
        data_collator=default_data_collator,
        options=options,
        heldout=heldout,
    )
    checkpoint = get_last_checkpoint(arguments.output_dir) if options.resume else None
    if options.resume and checkpoint is None:
        raise SystemExit(
            f"--resume: there is no checkpoint in {arguments.output_dir}; leave --resume out to start anew"
        )
    origin = provenance(options, arguments, trainer.model)  # now: the checkout may move on while this runs
    trainer.train(resume_from_checkpoint=checkpoint)

    model = trainer.accelerator.unwrap_model(trainer.model)
    model.to(torch.bfloat16)
    if trainer.is_world_process_zero():
        model.save_pretrained(options.output)
        EvaByteTokenizer().save_pretrained(options.output)
    model.float()  # what is evaluated is what was saved
    curve = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    report = {"provenance": origin, "final": full_evaluation(trainer), "curve": curve}
    if trainer.is_world_process_zero():
        (options.output / "training_log.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        plot_curve(curve, heldout, options.output / "loss_curve.png")


if __name__ == "__main__":
    main()
