"""`evabyte serve`, asked by the openai client; and what it changes of transformers' server, without one."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import transformers
from compatibility import MODELS
from speller import SPELLED, speller, tokenizer_of

from evabyte.bundled import bundled_checkpoint
from evabyte.cli import main
from evabyte.serving import ServedArchitectures

OPTIONS = ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
PLAIN = """
import importlib.abc, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("evabyte", "byte_llama"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from transformers.cli.transformers import app
app()
"""


def proves(feature):
    """Run a test for each of our models, as the proof of this row of docs/compatibility.md."""
    cells = [pytest.param(name, marks=pytest.mark.compatibility(feature, name), id=name) for name in MODELS]
    return pytest.mark.parametrize("name", cells, scope="module")


def save_speller(name, folder, multibyte=None):
    model = speller(name)
    if multibyte is not None:
        model.generation_config.multibyte = multibyte
    model.save_pretrained(folder)
    tokenizer_of(name).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def forwards(monkeypatch):
    """Grows by one at every forward of a model."""
    seen = []
    call = torch.nn.Module.__call__

    def counted(module, *args, **kwargs):
        if isinstance(module, transformers.GenerationMixin):
            seen.append(type(module).__name__)
        return call(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    return seen


# -- without a server --------------------------------------------------------------------------------------------------


@proves("generate with multibyte decoding by generation_config")
def test_a_saved_generation_config_decides(name, tmp_path, forwards):
    folder = save_speller(name, tmp_path, multibyte=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer_of(name)("b" + SPELLED["b"] * 4, return_tensors="pt")
    how = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**inputs, **how, multibyte=False)
    byte_by_byte = len(forwards)
    assert model.generate(**inputs, **how).tolist() == expected.tolist()
    assert byte_by_byte == 24 and len(forwards) - byte_by_byte <= 12
    assert model.generate(**inputs, **how, cache_implementation="static").tolist() == expected.tolist()


def test_a_server_finds_every_architecture(tmp_path):
    served = ServedArchitectures(transformers)
    assert served.LlamaForCausalLM is transformers.LlamaForCausalLM
    model = served.EvaByteForCausalLM.from_pretrained(save_speller("EvaByte", tmp_path / "unsaid"))
    assert type(model).__name__ == "EvaByteForCausalLM" and model.generation_config.multibyte is True
    model = ServedArchitectures(transformers, multibyte=False).TheirName.from_pretrained(tmp_path / "unsaid")
    assert model.generation_config.multibyte is False
    model = served.EvaByteForCausalLM.from_pretrained(save_speller("EvaByte", tmp_path / "no", multibyte=False))
    assert model.generation_config.multibyte is False


def test_a_folder_without_image_settings_has_a_processor():
    """Which the server asks for first, before a tokenizer."""
    processor = transformers.AutoProcessor.from_pretrained(bundled_checkpoint())
    assert processor(text=["né"])["input_ids"] == [processor.tokenizer("né")["input_ids"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--port", "1"], "no folder nowhere"),
        (["--port", "1", "--continuous-batching"], "--continuous-batching pages keys and values"),
    ],
)
def test_mistakes_in_a_line(arguments, message, capsys):
    assert main(["serve", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("evabyte serve: ") and message in said and said.count("\n") == 1


def test_only_a_server_takes_options_of_transformers(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--port", "1"])
    assert "unrecognized arguments: --port" in capsys.readouterr().err


# -- with one ----------------------------------------------------------------------------------------------------------


@contextmanager
def running(command, model, log, **environment):
    """A client of the server that the command starts, as soon as it answers."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command, *OPTIONS, "--port", str(port)],
            stdout=output,
            stderr=output,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except URLError:
                time.sleep(0.2)
        url = f"http://127.0.0.1:{port}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0)
        yield SimpleNamespace(client=client, model=model, url=url)
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def server(name, tmp_path_factory):
    folder = save_speller(name, tmp_path_factory.mktemp("folder") / "model")
    with running(["-m", "evabyte", "serve", folder], folder, tmp_path_factory.mktemp("log") / "log.txt") as server:
        yield server


def completion(server, prompt, **options):
    return server.client.completions.create(model=server.model, prompt=prompt, **options)


def pieces(stream):
    """The texts of a stream of completions that are not empty, and why it ended."""
    chunks = [chunk.choices[0] for chunk in stream]
    return [chunk.text for chunk in chunks if chunk.text], chunks[-1].finish_reason


@pytest.mark.slow
@proves("transformers serve, openai client, streaming")
def test_characters_arrive_whole(name, server):
    answer = completion(server, "a", temperature=0)
    assert answer.choices[0].text == SPELLED["a"] and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(SPELLED["a"].encode()) + 1  # with the end
    assert pieces(completion(server, "a", stream=True)) == (list(SPELLED["a"]), "stop")

    chat = {"model": server.model, "messages": [{"role": "user", "content": "漢?"}]}
    said = server.client.chat.completions.create(**chat).choices[0].message.content
    stream = server.client.chat.completions.create(**chat, stream=True)
    assert said == SPELLED["a"]
    assert [piece for chunk in stream if (piece := chunk.choices[0].delta.content)] == list(said)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS, scope="module")
def test_where_a_text_ends(name, server):
    assert pieces(completion(server, "b", max_tokens=100, stream=True)) == (list("xyz" * 33 + "x"), "length")
    assert completion(server, "b", max_tokens=100).choices[0].text == "xyz" * 33 + "x"
    assert pieces(completion(server, "b", stop=["yzxy"], stream=True)) == (list("xyzxy"), "stop")
    assert completion(server, "b", stop="zx").choices[0].text == "xyzx"
    # An unfinished character stays unsaid.
    assert pieces(completion(server, "a", max_tokens=4, stream=True)) == (["é"], "length")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EvaByte"], scope="module")
def test_pictures_in_messages(name, server):
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", (32, 32), "red").save(file, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    answer = server.client.chat.completions.create(model=server.model, messages=messages)
    assert answer.choices[0].message.content == SPELLED["a"]
    ids = transformers.AutoProcessor.from_pretrained(server.model).encode_chat(
        [{"role": "user", "content": [{"type": "image", "url": url}, content[1]]}], add_generation_prompt=True
    )
    assert answer.usage.prompt_tokens == len(ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS, scope="module")
def test_requests_at_the_same_time(name, server):
    prompts = ["a", "b", "c", "a", "c", "b"]
    with ThreadPoolExecutor(len(prompts)) as pool:
        streams = list(pool.map(lambda p: pieces(completion(server, p, max_tokens=60, stream=True))[0], prompts))
        whole = list(pool.map(lambda p: completion(server, p, max_tokens=60).choices[0].text, prompts))
    expected = {"a": SPELLED["a"], "b": SPELLED["b"] * 20, "c": SPELLED["c"]}
    assert ["".join(stream) for stream in streams] == whole == [expected[prompt] for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS, scope="module")
def test_a_client_that_leaves_ends_its_generation(name, server):
    stream = completion(server, "b", max_tokens=10**7, stream=True)
    assert next(iter(stream)).choices[0].text == "x"
    stream.close()
    # Requests wait for the one before: this one would wait for ten million bytes, and time out.
    assert completion(server, "c").choices[0].text == SPELLED["c"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS, scope="module")
def test_transformers_chat(name, server, tmp_path):
    pytest.importorskip("rich")
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from transformers.cli.transformers import app; app()",
            "chat",
            server.model,
            server.url,
        ],
        input="hello\n!exit\n",
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONIOENCODING": "utf-8"},  # offline, its client asks no server
    )
    assert run.returncode == 0, run.stderr
    assert SPELLED["a"] in run.stdout


@pytest.mark.slow
def test_the_bundled_model_says_what_generate_says(tmp_path):
    folder, text = str(bundled_checkpoint()), "The House of Representatives of the United"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    sampling = {"do_sample": True, "top_p": 0.9, "temperature": 0.8, "max_new_tokens": 80}

    def expected(seed=0, **how):
        torch.manual_seed(seed)
        ids = model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(ids, skip_special_tokens=True)

    with running(["-m", "evabyte", "serve"], folder, tmp_path / "log.txt") as server:
        greedy = completion(server, text, max_tokens=80, temperature=0)
        assert greedy.choices[0].text == expected(do_sample=False, max_new_tokens=80)
        for seed in (1, 2):
            body = {"generation_config": json.dumps(sampling), "seed": seed}
            answer = completion(server, text, extra_body=body)
            assert answer.choices[0].text == expected(seed, **sampling)
    assert expected(1, **sampling) != expected(2, **sampling)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_for_servers_without_this_package(name, tmp_path):
    folder = save_speller(name, tmp_path / "model", multibyte=True)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["architectures"] = ["AutoModelForCausalLM"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    command = ["-c", PLAIN, "serve", folder, "--trust-remote-code"]
    with running(command, folder, tmp_path / "log.txt", HF_MODULES_CACHE=str(tmp_path / "modules")) as server:
        assert pieces(completion(server, "a", stream=True)) == (list(SPELLED["a"]), "stop")


@pytest.mark.slow
def test_continuous_batching(tmp_path):
    folder = save_speller("byte Llama", tmp_path / "model")
    options = ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]
    with running(["-m", "evabyte", "serve", folder, *options], folder, tmp_path / "log.txt") as server:
        prompts = ["a", "b", "c", "a"]
        with ThreadPoolExecutor(len(prompts)) as pool:
            texts = pool.map(lambda p: "".join(pieces(completion(server, p, max_tokens=30, stream=True))[0]), prompts)
            assert list(texts) == [SPELLED["a"], "xyz" * 10, SPELLED["c"], SPELLED["a"]]
