"""examples/serve_batch.py and its benchmark: what is printed is what `generate` writes, and nothing wrong is timed."""

import importlib
import io
import json
import sys
from pathlib import Path

import pytest
from tiny import fresh_model

from evabyte import EvaByteForCausalLM, EvaByteTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ["The House of", "def", "A longer prompt than the others"]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("serve_batch"), importlib.import_module("batching")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    fresh_model(max_position_embeddings=2048).save_pretrained(path)
    EvaByteTokenizer().save_pretrained(path)
    return path


def answers(output):
    """By number, the answers printed, which may have several lines."""
    found, number = {}, None
    for line in output.splitlines(keepends=True):
        head = line.partition("] ")
        if head[0].startswith("[") and head[0][1:].isdigit():
            number, line = int(head[0][1:]), head[2]
        if number is not None:
            found[number] = found.get(number, "") + line
    return found


def test_answers(scripts, folder, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    scripts[0].main([str(path), "--model", str(folder), "--rows", "2", "--new-bytes", "20"])
    output, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    tokenizer, model = EvaByteTokenizer(), EvaByteForCausalLM.from_pretrained(folder)
    found, written = answers(output + "\n"), 0
    assert found.keys() == {1, 2, 3}
    for number, prompt in enumerate(PROMPTS, start=1):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        assert found[number] == tokenizer.decode(new, skip_special_tokens=True) + "\n"
        written += len(new)
    assert last.startswith(f"{written} bytes for 3 prompts in ")


def test_sampled_answers_come_again(scripts, folder, monkeypatch, capsys):
    found = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROMPTS)))
        arguments = ["--model", str(folder), "--rows", "2", "--new-bytes", "9", "--temperature", "1.2", "--seed", seed]
        scripts[0].main(arguments)
        found.append(answers(capsys.readouterr().out.rpartition(" bytes for")[0].rpartition("\n")[0]))
    assert found[0] == found[1] != found[2]


def test_without_prompts(scripts, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(SystemExit):
        scripts[0].main(["--model", str(folder)])
    assert "there are no prompts" in capsys.readouterr().err


def test_comparing(scripts, folder, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    scripts[0].main([str(path), "--model", str(folder), "--rows", "2", "--new-bytes", "5", "--compare"])
    table = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert table == [["alone", "1"], ["engine", "1"], ["padded", "2"], ["engine", "2"]]


def small(folder):
    sizes = "--requests 4 --prompt-bytes 20 40 --new-bytes 5 9 --rows 1 3 --repeats 2"
    return ["--model", str(folder), *sizes.split()]


def test_the_benchmark(scripts, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("measure.RESULTS", tmp_path)
    scripts[1].main([*small(folder), "--save", "tiny"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "tiny.json").read_text()) == result
    assert result["equal_to_generate_in_float32"] is True
    assert result["bytes_per_round"] == 5 + 5 + 9 + 9
    assert [(row["way"], row["rows"]) for row in result["served"]] == [
        ("alone", 1), ("engine", 1), ("padded", 3), ("engine", 3)
    ]  # fmt: skip
    for row in result["served"]:
        assert 0 < row["speedup_over_alone"]["min"] <= row["speedup_over_alone"]["max"]
    assert {"speedup_over_padded", "speedup_over_one_row"} <= result["served"][-1].keys()


def test_nothing_is_timed_when_bytes_differ(scripts, folder, monkeypatch, capsys):
    right = scripts[1].in_engine

    def wrong(model, jobs, rows, **sizes):
        written = right(model, jobs, rows, **sizes)
        written[2][-1] += 1
        return written

    monkeypatch.setattr(scripts[1], "in_engine", wrong)
    with pytest.raises(SystemExit, match=r"request 2 gets other bytes from 'engine' at 1 rows in torch\.float32"):
        scripts[1].main(small(folder))
    assert capsys.readouterr().out == ""


def test_prompts_that_do_not_fit_are_refused(scripts):
    with pytest.raises(SystemExit, match="do not fit into the held-out texts"):
        scripts[1].heldout_jobs(4, [10**7], [5])


def test_requests_of_the_benchmark_differ(scripts):
    jobs = scripts[1].heldout_jobs(12, [20, 40, 60], [5, 9])
    assert len({tuple(job.prompt) for job in jobs}) == 12
    assert len({(len(job.prompt), job.new_bytes) for job in jobs}) == 6
