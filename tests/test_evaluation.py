"""What lm-evaluation-harness reports of our models is what follows from their logits, computed one text at a time."""

import json
import math
import subprocess
import sys
from functools import cache

import pytest
import torch
from compatibility import MODELS
from evaluated_models import evaluated_model

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evabyte import multibyte_generation
from evabyte.cli import main
from evabyte.evaluation import CARD, ByteHFLM, evaluate, find_tasks, score_table

ROW = "lm-evaluation-harness, multiple choice and generation"
QUESTIONS = [
    {"text": "Question: is water wet?\nAnswer:", "choices": ["yes", "no, naïvely"], "gold": 0},
    {"text": "Fox", "choices": ["es", "ing", "trot 42 €"], "gold": 2},
    {"text": "The quick brown fox jumps over the lazy dog, and the dog", "choices": ["sleeps", "x"], "gold": 1},
    {"text": "2 + 2 =", "choices": ["4", "5", "6", "7"], "gold": 0},
    {"text": "Der flinke Fuchs springt:", "choices": ["über", "unter", "nie"], "gold": 1},
]
CHOICE = """
task: little_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
WRITING = """
task: little_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["W", "é!"], max_gen_toks: 5}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: little_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
"""
STOPS, TOKENS = ["W", "é!"], 5  # of the task above; no stop is part of a special token's name
TASKS = ["little_choice", "little_writing", "little_rolling"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of task files."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, task in zip(TASKS, (CHOICE, WRITING, ROLLING), strict=True):
        (folder / f"{name}.yaml").write_text(task.replace("DATA", json.dumps(str(data))))
    return folder


def requests(kind, arguments):
    return [Instance(kind, {}, some, index) for index, some in enumerate(arguments)]


@torch.no_grad()
def log_likelihood(name, prompt, answer):
    """log p(answer | bos, prompt), from the logits of one forward."""
    model, tokenizer = evaluated_model(name)
    read, rest = prompt.encode(), answer.encode()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode_bytes(read + rest, add_special_tokens=False)]])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[len(read) :].sum().item()


@cache
def written(name, prompt):
    """What plain `generate` writes after a prompt, byte by byte, up to a stop."""
    model, tokenizer = evaluated_model(name)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode_bytes(prompt.encode(), add_special_tokens=False)]])
    how = {"do_sample": False, "multibyte": False, "eos_token_id": tokenizer.eos_token_id}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4 * TOKENS, **how)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return min((text.split(stop)[0] for stop in STOPS), key=len)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.compatibility(ROW, name), id=name) for name in MODELS]
)
def test_scores_follow_from_the_logits(name, folder):
    results = evaluate(*evaluated_model(name), TASKS, [folder], batch_size=4)
    choice, writing, rolling = (results["results"][task] for task in TASKS)

    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    lengths = {"acc": lambda answer: 1, "acc_norm": len, "acc_bytes": lambda answer: len(answer.encode())}
    for question in QUESTIONS:
        answers = question["choices"]
        found = [log_likelihood(name, question["text"] + " ", answer) for answer in answers]
        for metric, length in lengths.items():
            values = [value / length(answer) for value, answer in zip(found, answers, strict=True)]
            right[metric] += values.index(max(values)) == question["gold"]
    assert {metric: choice[f"{metric},none"] * len(QUESTIONS) for metric in right} == pytest.approx(right)

    hits = [written(name, question["text"]) == question["choices"][0] for question in QUESTIONS]
    assert writing["exact_match,none"] == pytest.approx(sum(hits) / len(hits))

    nats = -sum(log_likelihood(name, "", question["text"]) for question in QUESTIONS)
    count = sum(len(question["text"].encode()) for question in QUESTIONS)
    assert rolling["bits_per_byte,none"] == pytest.approx(nats / count / math.log(2), rel=1e-4)
    assert rolling["byte_perplexity,none"] == pytest.approx(math.exp(nats / count), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_requests(name):
    """The numbers and texts behind the scores, at any batch size."""
    asked = [(question["text"], " ", answer) for question in QUESTIONS for answer in question["choices"]]
    asked += [("Space of the prompt's own ", "", "end"), ("", "", "no prompt"), ("blank", "", " ")]
    expected = [log_likelihood(name, prompt + space, answer) for prompt, space, answer in asked]
    pairs = [(prompt, space + answer) for prompt, space, answer in asked]
    options = {"until": STOPS, "max_gen_toks": TOKENS}
    prompts = [question["text"] for question in QUESTIONS]
    texts = [written(name, prompt) for prompt in prompts]
    assert any(texts)
    for batch_size in (1, 4):
        lm = ByteHFLM(*evaluated_model(name), batch_size=batch_size)
        found = [value for value, _ in lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
        wanted = requests("generate_until", [(prompt, options) for prompt in prompts])
        assert lm.generate_until(wanted, disable_tqdm=True) == texts


@pytest.mark.parametrize("name", MODELS)
def test_harness_as_it_is(name):
    """The harness's own `hf` model reads and writes the same, by multibyte decoding where a call asks for it."""
    model, tokenizer = evaluated_model(name)
    pairs = [(question["text"], f" {answer}") for question in QUESTIONS for answer in question["choices"]]
    texts = [(question["text"],) for question in QUESTIONS]
    expected = [log_likelihood(name, *pair) for pair in pairs]
    for batch_size, multibyte in ((1, False), (3, False), (3, True)):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = [value for value, _ in lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
        assert found == pytest.approx(expected, rel=1e-4)
        options = {"until": STOPS, "max_gen_toks": 4 * TOKENS, "multibyte": multibyte}
        wanted = requests("generate_until", [(text, options) for (text,) in texts])
        assert lm.generate_until(wanted, disable_tqdm=True) == [written(name, text) for (text,) in texts]
    # Unless told not to, it takes a text's bos for the first byte to predict.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, add_bos_token=False)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx([log_likelihood(name, "", text) for (text,) in texts], rel=1e-4)


def test_generation_is_multibyte_for_models_with_heads(monkeypatch):
    model, tokenizer = evaluated_model("EvaByte")
    seen = []
    init = multibyte_generation._Run.__init__
    monkeypatch.setattr(multibyte_generation._Run, "__init__", lambda *args: seen.append(init(*args)))
    wanted = requests("generate_until", [("a", {"until": [], "max_gen_toks": 1})])
    for multibyte, runs in ((None, 1), (False, 1), (True, 2)):
        ByteHFLM(model, tokenizer, multibyte).generate_until(wanted, disable_tqdm=True)
        assert len(seen) == runs
    ByteHFLM(*evaluated_model("byte Llama")).generate_until(wanted, disable_tqdm=True)
    assert len(seen) == 2


def test_lengths_are_in_bytes():
    lm = ByteHFLM(*evaluated_model("EvaByte"), max_length=2000)
    assert lm.max_gen_toks == 1024
    sampled = {"until": [], "max_new_tokens": 3, "do_sample": True, "temperature": 2.0}
    (text,) = lm.generate_until(requests("generate_until", [("a", sampled)]), disable_tqdm=True)
    assert len(text.encode()) <= 12


def test_chats_begin_once():
    """A chat's text has its special tokens in it: they are read as such, and none is added."""
    model, tokenizer = evaluated_model("EvaByte")
    chat = [{"role": "user", "content": "Is water wet?"}]
    lm = ByteHFLM(model, tokenizer, batch_size=2)
    ids = tokenizer.encode_chat(chat, add_generation_prompt=True)
    prompt = lm.apply_chat_template(chat)
    assert lm._encode_pair(prompt, "yes") == (ids, tokenizer.encode_bytes(b"yes", add_special_tokens=False))
    assert lm.tok_batch_encode([prompt])[0].tolist() == [ids]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    saved = tmp_path_factory.mktemp("model")
    model, tokenizer = evaluated_model("EvaByte")
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    return str(saved)


def test_command(saved, folder, capsys):
    options = ["--tasks", "little_choice,little_rolling", "--include-path", str(folder), "--limit", "3"]
    results = evaluate(*evaluated_model("EvaByte"), ["little_choice", "little_rolling"], [folder], limit=3)
    assert main(["eval", saved, *options, "--batch-size", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for task in ("little_choice", "little_rolling"):
        for metric, value in results["results"][task].items():
            same = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert printed["results"][task][metric] == same
    assert main(["eval", saved, *options]) == 0
    assert capsys.readouterr().out.strip() == score_table(results, ["little_choice", "little_rolling"])
    accuracy = results["results"]["little_choice"]["acc,none"]
    assert f"| little_choice | 0 | acc | {accuracy:.4f} | " in score_table(results, ["little_choice"])


def test_without_the_harness(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "evabyte.evaluation")
    assert main(["eval", saved]) == 2
    assert "needs lm-evaluation-harness: pip install 'evabyte[eval]'" in capsys.readouterr().err


@pytest.mark.slow
def test_tasks_of_the_harness(saved, capsys):
    """The card's are known; another is refused before the model is loaded."""
    find_tasks(CARD)
    assert main(["eval", "/no/such/model", "--tasks", "mmlu", "no_such_task"]) == 2
    assert "there is no task no_such_task" in capsys.readouterr().err


@pytest.mark.slow
def test_the_harness_own_command(saved, folder, tmp_path):
    """`lm_eval --model hf` on a folder that brings its code, with multibyte decoding by an argument of the call."""
    words = ["--model", "hf", "--model_args", f"pretrained={saved},trust_remote_code=True,dtype=float32"]
    words += ["--tasks", ",".join(TASKS[:2]), "--include_path", str(folder), "--device", "cpu", "--batch_size", "3"]
    words += ["--gen_kwargs", f"multibyte=True,max_gen_toks={4 * TOKENS}", "--log_samples", "--output_path", "out"]
    done = subprocess.run([sys.executable, "-m", "lm_eval", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("out/**/samples_little_writing_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    found = {sample["doc"]["text"]: sample["resps"][0][0] for sample in samples}
    assert found == {question["text"]: written("EvaByte", question["text"]) for question in QUESTIONS}
