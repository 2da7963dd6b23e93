"""Fine-tuning on chats: what is learned, that packing changes nothing, and whole runs on tiny models."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import fresh_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from byte_llama.tokenization_byte_llama import ByteLlamaTokenizer
from evabyte import EvaByteTokenizer

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests" / "byte_llama")]
sft = importlib.import_module("sft")
small_models = importlib.import_module("small_models")

KINDS = ["evabyte", "llama", "gemma2"]
CHATS = [
    [
        {"role": "user", "content": f"{a} + {b}?"},
        {"role": "assistant", "content": f"It is {a + b}. " * (1 + a)},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    for a in range(4)
    for b in range(5)
]


@cache
def tokenizer_of(kind):
    if kind == "evabyte":
        return EvaByteTokenizer()
    folder = ROOT / "tests" / "goldens" / "byte_llama" / "tokenizer" / {"llama": "llama3_1"}.get(kind, kind)
    tokenizer = ByteLlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = json.loads((folder / "chat.json").read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def model_of(kind, **overrides):
    """A tiny model whose predictions are nearly uniform, as those of one that knows nothing."""
    tokenizer = tokenizer_of(kind)
    if kind == "evabyte":
        model = fresh_model(**overrides)
    else:
        special = {f"{part}_token_id": getattr(tokenizer, f"{part}_token_id") for part in ("bos", "eos", "pad")}
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
        model = small_models.fresh_model(kind, **sizes, **special, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 if kind == "evabyte" else 0.6)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with one folder for each kind of model, and the chats."""
    folder = tmp_path_factory.mktemp("sft")
    for kind in KINDS:
        model_of(kind).save_pretrained(folder / kind)
        tokenizer_of(kind).save_pretrained(folder / kind)
    lines = [json.dumps({"messages": chat}) for chat in CHATS]
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def arguments(base, kind, output, *more):
    paths = [
        "--model",
        base / kind,
        "--data",
        base / "chats.jsonl",
        "--output",
        output,
        "--output-dir",
        f"{output}-run",
    ]
    common = "--max-length 400 --max-steps 4 --logging-steps 1 --save-strategy no --disable-tqdm True".split()
    return [*map(str, paths), *common, "--learning-rate", "1e-2", *more]


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# -- what is learned ---------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "Hé <|eot_id|>"},
    {"role": "assistant", "content": "A\n<|eot_id|>"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": ""},
]


def by_hand(kind):
    """Ids and labels of `CHAT`, written down piece by piece: bytes, or a special id, and whether they are learned."""
    if kind == "evabyte":
        header = [(9, False), ("ROLE", False), (10, False), (b"\n\n", False)]
        start = [(1, False), (9, False), (b"system", False), (10, False), (b"\n\n", False), (11, False)]
        end, shift, roles = 11, 64, {}
    elif kind == "llama":  # its template words are single ids
        header = [(260, False), ("ROLE", False), (257, False), (264, False)]
        start, end, shift, roles = [(256, False)], 259, 0, {"user": 263, "assistant": 261}
    else:
        header = [(260, False), ("ROLE", False), (b"\n", False)]
        start, end, shift, roles = [(256, False)], 257, 0, {"user": 262, "assistant": 261}
    pieces = list(start)
    for message in CHAT:
        role, learned = message["role"], message["role"] == "assistant"
        pieces += [(roles.get(role, role.encode()) if piece == "ROLE" else piece, on) for piece, on in header]
        pieces += [(message["content"].encode(), learned), (end, learned)]
        if kind == "gemma2":
            pieces.append((b"\n", False))
    ids, labels = [], []
    for piece, learned in pieces:
        new = [piece] if isinstance(piece, int) else [byte + shift for byte in piece]
        ids += new
        labels += new if learned else [-100] * len(new)
    return ids, labels


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_assistants_bytes_and_their_end_are_learned(kind):
    assert sft.encode(tokenizer_of(kind), CHAT) == by_hand(kind)


@settings(max_examples=15)
@given(contents=st.lists(st.text(max_size=8), min_size=1, max_size=5))
def test_any_answers_are_learned_whole(contents):
    tokenizer = tokenizer_of("evabyte")
    messages = [{"role": role, "content": text} for text in contents for role in ("user", "assistant")]
    ids, labels = sft.encode(tokenizer, messages)
    assert ids == tokenizer.encode_chat(messages)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    learned = [label for label in labels if label != -100]
    assert learned == [token for text in contents for token in (*(64 + byte for byte in text.encode()), 11)]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = EvaByteTokenizer(
        chat_template="{% for m in messages %}{{ m.role if loop.last else 'x' }}:{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(ValueError, match="writes earlier turns differently"):
        sft.encode(tokenizer, CHAT)


# -- packing -----------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_rows_hold_every_chat_once(lengths):
    chats = [
        (np.full(length, number, np.int16), np.full(length, number, np.int16)) for number, length in enumerate(lengths)
    ]
    rows = sft.pack(chats, 20)
    assert all(sum(len(ids) for ids, _ in row) <= 20 for row in rows)
    packed = Counter(int(token) for row in rows for ids, labels in row for token in ids)
    assert packed == {number: length for number, length in enumerate(lengths)}
    if max(lengths) <= 10:  # then no two rows but the last are less than half full
        assert len(rows) <= 1 + sum(lengths) // 10


@pytest.mark.parametrize("kind, heads", [("evabyte", 4), ("llama", 1), ("llama", 3), ("gemma2", 1)])
def test_packed_chats_learn_as_if_alone(base, kind, heads):
    model, tokenizer = model_of(kind, num_pred_heads=heads), tokenizer_of(kind)
    model.config.use_cache = False  # as `Trainer` sets it
    chats = sft.encode_all(tokenizer, CHATS[::3], 90, "chats")
    rows = sft.pack(chats, 250)
    assert len(rows) < len(chats)
    batch = sft.collate([{"input_ids": [i for i, _ in row], "labels": [n for _, n in row]} for row in rows])
    items = int((batch["labels"] != -100).sum())
    alone = sum(
        model(
            torch.tensor(ids[None], dtype=torch.int64),
            labels=torch.tensor(labels[None], dtype=torch.int64),
            num_items_in_batch=items,
        ).loss
        for ids, labels in chats
    )
    torch.testing.assert_close(model(**batch, num_items_in_batch=items).loss, alone)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_writes_a_complete_model(base, tmp_path, kind, capsys):
    more = ["--eval-data", str(base / "chats.jsonl"), "--per-device-train-batch-size", "2"]
    trainer = sft.main(arguments(base, kind, tmp_path / "out", *more))
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] - 0.1
    assert trainer.state.log_history[-1]["eval_loss"] < losses[0] - 0.1

    model, tokenizer = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModelForCausalLM, AutoTokenizer))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert tokenizer.encode_chat(CHAT) == tokenizer_of(kind).encode_chat(CHAT)
    ends = model.generation_config.eos_token_id
    assert {"evabyte": 11, "llama": 259, "gemma2": 257}[kind] in (ends if isinstance(ends, list) else [ends])
    assert model.config.use_cache and not (tmp_path / "out" / "training_args.bin").exists()
    if kind != "evabyte":
        before = AutoModelForCausalLM.from_pretrained(base / kind).model
        assert torch.equal(model.model.expand_embed_tokens.weight, before.expand_embed_tokens.weight)
        assert not torch.equal(model.model.embed_tokens.weight, before.embed_tokens.weight)


@pytest.mark.parametrize("kind", ["evabyte", "llama"])
def test_lora_is_merged_into_what_is_written(base, tmp_path, kind):
    from peft import PeftModel

    more = "--lora-rank 4 --bf16 --gradient-checkpointing --learning-rate 3e-2".split()
    trainer = sft.main(arguments(base, kind, tmp_path / "out", *more))
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] - 0.01
    ids = torch.tensor([tokenizer_of(kind).encode_chat(CHATS[0])])
    original = AutoModelForCausalLM.from_pretrained(base / kind).eval()
    with torch.no_grad():
        before = original(ids).logits
        adapted = PeftModel.from_pretrained(original, tmp_path / "out" / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert (merged - before).abs().max() > 1e-2


def test_how_rows_are_cut_and_computed_changes_no_loss(base, tmp_path):
    """One step on all chats: packed or not, in one batch or accumulated, with checkpointing or without."""
    ways = {
        "packed": "--per-device-train-batch-size 8",
        "accumulated": "--gradient-accumulation-steps 8",
        "unpacked": "--packing False --per-device-train-batch-size 20 --gradient-checkpointing",
    }
    first = {}
    for way, options in ways.items():
        more = ["--max-length", "500", "--max-steps", "1", *options.split()]
        first[way] = losses_of(sft.main(arguments(base, "evabyte", tmp_path / way, *more)))[0]
    assert first == pytest.approx(dict.fromkeys(ways, first["packed"]), rel=1e-4)


def test_resumed_runs_end_where_whole_ones_do(base, tmp_path):
    saving = ["--save-strategy", "steps", "--save-steps", "2"]
    sft.main(arguments(base, "evabyte", tmp_path / "out", *saving))
    shutil.rmtree(tmp_path / "out-run" / "checkpoint-4")
    (tmp_path / "out").rename(tmp_path / "whole")
    sft.main(arguments(base, "evabyte", tmp_path / "out", *saving, "--resume"))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_trls_trainer_learns_the_same(base, tmp_path):
    pytest.importorskip("trl")
    names = ("transformers", "trl")
    runs = [sft.main(arguments(base, "evabyte", tmp_path / name, "--trainer", name, "--bf16")) for name in names]
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), rel=1e-4)


SHARD_ON_CPU = """
import sys
from accelerate import state
from accelerate.utils import DistributedType

start = state.PartialState.__init__

def start_as_if_on_gpus(self, *args, **kwargs):  # accelerate shards on accelerators only
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

state.PartialState.__init__ = start_as_if_on_gpus
import sft

trainer = sft.main(sys.argv[1:])
assert type(trainer.model_wrapped).__name__.startswith("FSDP"), type(trainer.model_wrapped)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [[], ["--lora-rank", "4"]], ids=["full", "lora"])
def test_two_sharded_processes_learn_as_one_does(base, tmp_path, kind, options):
    options = [*options, "--packing", "False"]  # an even number of rows: with an odd one accelerate repeats the first
    alone = arguments(base, kind, tmp_path / "one", *options, "--per-device-train-batch-size", "2")
    expected = losses_of(sft.main(alone))
    (tmp_path / "shard_on_cpu.py").write_text(SHARD_ON_CPU)
    config = ROOT / "examples" / "accelerate" / "fsdp.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config-file", config, "--num-processes", "2"]
    launch += ["--mixed-precision", "no", "--main-process-port", "0", tmp_path / "shard_on_cpu.py"]
    saving = ["--save-strategy", "steps", "--save-steps", "4"]
    sharded = arguments(base, kind, tmp_path / "two", *options, *saving)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    done = subprocess.run(
        [sys.executable, *map(str, launch), *sharded],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "two-run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["loss"] for entry in state["log_history"] if "loss" in entry] == pytest.approx(expected, rel=1e-4)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
    names = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert next(names) == next(names)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        (["--label-smoothing-factor", "0.1"], "--label-smoothing-factor"),
        (["--eval-strategy", "epoch"], "--eval-strategy needs --eval-data"),
        (["--resume"], "--resume: there is no checkpoint in"),
    ],
)
def test_options_that_do_not_work(base, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        sft.main(arguments(base, "evabyte", tmp_path / "out", *more))
    assert message in capsys.readouterr().err


def test_output_is_not_overwritten(base, capsys):
    with pytest.raises(SystemExit):
        sft.main(arguments(base, "evabyte", base / "llama"))
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not an object"),
        ('{"text": "x"}', 'line 2 is not an object with "messages"'),
        ("[1]", "line 2 is not an object"),
        ('{"messages": "x"}', "chat 2: messages must be one list of dicts"),
        ('{"messages": [{"content": "x"}]}', "chat 2: "),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "chat 2: The role of a message"),
    ],
)
def test_chats_that_are_none_are_named(tmp_path, line, message):
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': CHATS[0]})}\n{line}\n")
    chats = sft.read_chats(str(tmp_path / "chats.jsonl"))
    with pytest.raises(SystemExit, match=message):
        sft.encode_all(tokenizer_of("evabyte"), chats, 100, "chats")


def test_chats_without_answers_are_left_out(capsys):
    unanswered = CHATS[0][:1]
    length = len(tokenizer_of("evabyte").encode_chat(CHATS[0]))
    chats = sft.encode_all(tokenizer_of("evabyte"), [unanswered, CHATS[0], CHATS[0]], length - 1, "chats")
    assert [len(ids) for ids, _ in chats] == [length - 1] * 2
    assert "2 chats, 2 cut to --max-length; 1 left out, unanswered" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no chat in which an assistant says something"):
        sft.encode_all(tokenizer_of("evabyte"), [unanswered], 100, "chats")
