"""The command line gives what the model gives, and answers mistakes in one line."""

import io
import re
import subprocess
import sys

import pytest
import torch
from tiny import fresh_model
from transformers import DynamicCache

from evabyte import EvaByteTokenizer, __version__
from evabyte.bundled import bundled_checkpoint
from evabyte.cli import generate, main
from evabyte.cli.chat import Chat
from evabyte.cli.decode import Generation
from evabyte.cli.demo import compare
from evabyte.cli.info import cache_bytes
from evabyte.cli.output import CYAN, MAGENTA, RESET, ForwardStreamer, wants_colour
from evabyte_cli.parsing import INTERRUPTED, PIPE_CLOSED

TOKENIZER = EvaByteTokenizer()
MODEL = fresh_model(window_size=32, chunk_size=4, num_pred_heads=8)
PROMPT = "It was a dark night"
GREEDY = ["--temperature", "0", "--max-new-tokens", "60"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    MODEL.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


def continuation(ids, **arguments):
    """What plain `generate` writes after `ids`, greedily."""
    inputs = torch.tensor([ids])
    output = MODEL.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, **arguments)
    return TOKENIZER.decode(output[0, len(ids) :], skip_special_tokens=True, errors="replace")


# -- generate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [[], ["--draft", "tree31"], ["--draft", "lookup"], ["--byte-by-byte"]])
def test_generate_writes_the_models_continuation(folder, capsys, how):
    assert main(["generate", PROMPT, "--model", folder, *GREEDY, *how]) == 0
    written = capsys.readouterr()
    assert written.out == continuation(TOKENIZER.encode(PROMPT), max_new_tokens=60)
    assert re.fullmatch(r"60 bytes in [\d.]+ s \(\d+ bytes/s\), \d+ forwards, [\d.]+ bytes per forward\n", written.err)


def test_trace_accounts_for_every_byte(folder, capsys):
    assert main(["generate", PROMPT, "--model", folder, *GREEDY, "--trace", "--draft", "dynamic+lookup"]) == 0
    lines = capsys.readouterr().err.splitlines()
    steps = [[int(number) for number in line.split(maxsplit=4)[:4]] for line in lines[1:-1]]
    assert [step[0] for step in steps] == list(range(len(steps)))
    assert sum(heads + lookup + 1 for _, _, heads, lookup in steps) == 60 and f"{len(steps)} forwards" in lines[-1]
    assert all(heads + lookup <= drafted for _, drafted, heads, lookup in steps)


def test_byte_by_byte_takes_a_forward_for_each_byte(folder, capsys):
    main(["generate", PROMPT, "--model", folder, *GREEDY, "--byte-by-byte"])
    assert "60 forwards, 1.0 bytes per forward" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", [[], ["-"]])
def test_standard_input_is_taken_byte_by_byte(folder, capsys, stdin, prompt):
    data = b"caf\xe9 <eos>\n"
    stdin(data)
    assert main(["generate", *prompt, "--model", folder, *GREEDY]) == 0
    assert capsys.readouterr().out == continuation([1, *(64 + byte for byte in data)], max_new_tokens=60)


def test_an_empty_prompt_is_bos_alone(folder, capsys):
    assert main(["generate", "", "--model", folder, *GREEDY]) == 0
    written = capsys.readouterr()
    assert written.out == continuation([1], max_new_tokens=60)
    assert "empty" in written.err


def test_sampling_repeats_with_the_seed_only(folder, capsys):
    def sample(*arguments):
        main(["generate", PROMPT, "--model", folder, "-n", "40", "--temperature", "1", *arguments])
        return capsys.readouterr().out

    assert sample("--seed", "3") == sample("--seed", "3")
    assert sample("--seed", "3") == sample("--seed", "3", "--byte-by-byte")
    assert sample() != sample()
    assert sample("--top-k", "1") == sample("--top-p", "1e-9") == sample("--temperature", "0")


def test_stop(folder, capsys):
    text = continuation(TOKENIZER.encode(PROMPT), max_new_tokens=60)
    stop = re.search("[!-~]", text[5:])[0]
    main(["generate", PROMPT, "--model", folder, *GREEDY, "--stop", stop, "--stop", "never seen"])
    assert capsys.readouterr().out == text[: text.index(stop) + 1]


def test_colours_on_a_terminal(folder, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["generate", PROMPT, "--model", folder, *GREEDY]) == 0
    runs = re.findall(r"(\x1b\[\d+m)([^\x1b]+)\x1b\[0m", terminal.getvalue())
    assert "".join(f"{colour}{text}{RESET}" for colour, text in runs) + "\n" == terminal.getvalue()
    assert [colour for colour, _ in runs] == [CYAN if run % 2 == 0 else MAGENTA for run in range(len(runs))]
    shown = continuation(TOKENIZER.encode(PROMPT), max_new_tokens=60)
    shown = re.sub("[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), shown)
    shown = re.sub("[\x80-\x9f]", "\ufffd", shown).replace("\x7f", "\u2421")
    assert "".join(text for _, text in runs) == shown


def test_no_colours_elsewhere(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(Terminal())
    assert not wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(Terminal())


def test_a_character_has_the_colour_of_the_forward_that_completed_it():
    terminal = Terminal()
    streamer = ForwardStreamer(TOKENIZER, terminal, colour=True)
    for text in (b"prompt", b"ab", b"\xc3", b"\xa9\x1b", b"d\n"):
        streamer.put(torch.tensor(TOKENIZER.encode_bytes(text, add_special_tokens=False)))
    streamer.end()
    assert terminal.getvalue() == f"{CYAN}ab{RESET}{MAGENTA}é␛{RESET}{CYAN}d\n{RESET}"
    assert (streamer.forwards, len(streamer.ids)) == (4, 7)


def test_ctrl_c_ends_a_text_and_counts_it(folder, capsys, monkeypatch):
    monkeypatch.setattr(generate, "ForwardStreamer", impatient_streamer(forwards=5))
    assert main(["generate", PROMPT, "--model", folder, *GREEDY, "--byte-by-byte"]) == INTERRUPTED
    written = capsys.readouterr()
    assert written.out == continuation(TOKENIZER.encode(PROMPT), max_new_tokens=5)
    assert "5 forwards" in written.err


def impatient_streamer(forwards):
    class ImpatientStreamer(ForwardStreamer):
        def put(self, value):
            super().put(value)
            if self.forwards == forwards:
                raise KeyboardInterrupt

    return ImpatientStreamer


# -- chat --------------------------------------------------------------------------------------------------------------


def test_chat_answers_each_line(folder, capsys, stdin):
    stdin(b"hello\n\n<|eot_id|>\n/reset\nhello\n/exit\nmore\n")
    assert main(["chat", "--model", folder, "--system", "Be short.", *GREEDY]) == 0
    written = capsys.readouterr()
    start = [{"role": "system", "content": "Be short."}]
    messages, answers = start.copy(), []
    for said in ("hello", "<|eot_id|>"):
        messages.append({"role": "user", "content": said})
        ids = TOKENIZER.encode_chat(messages, add_generation_prompt=True)
        answers.append(continuation(ids, max_new_tokens=60, eos_token_id=[2, 11]))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert written.out == "\n".join([*answers, answers[0], ""])
    assert "base model" in written.err


def test_chat_keeps_the_cache_between_turns():
    ascii_only = {"suppress_tokens": [*range(64 + 32), *range(64 + 127, 320)], "max_new_tokens": 50}
    chat = Chat(MODEL, TOKENIZER, do_sample=False, **ascii_only)
    read = []
    hook = MODEL.model.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    for turn in range(3):
        read.clear()
        result = chat.answer("and then?", ForwardStreamer(TOKENIZER, io.StringIO()))
        if turn:
            assert read[0] < 100  # what is new, not the whole conversation
        ids = TOKENIZER.encode_chat(chat.messages[:-1], add_generation_prompt=True)
        assert TOKENIZER.decode(result.ids) == chat.messages[-1]["content"] == continuation(ids, **ascii_only)
    hook.remove()
    assert len(ids) > 4 * 32  # across borders of windows


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on():
    chat = Chat(MODEL, TOKENIZER, max_new_tokens=40, do_sample=False)
    result = chat.answer("hello", impatient_streamer(forwards=3)(TOKENIZER, io.StringIO()))
    assert result.interrupted
    assert chat.messages[-1] == {"role": "assistant", "content": TOKENIZER.decode(result.ids, True, errors="replace")}
    ids = TOKENIZER.encode_chat([*chat.messages, {"role": "user", "content": "go on"}], add_generation_prompt=True)
    result = chat.answer("go on", ForwardStreamer(TOKENIZER, io.StringIO()))
    expected = continuation(ids, max_new_tokens=40, eos_token_id=[2, 11])
    assert TOKENIZER.decode(result.ids, True, errors="replace") == expected


# -- info --------------------------------------------------------------------------------------------------------------


def test_info(folder, capsys):
    assert main(["info", folder, "--context", "20", "--context", "64"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    parameters = MODEL.num_parameters()
    assert f"parameters {parameters:,}" in lines
    assert f"weights {parameters * 4 / 1000:.2f} kB, float32" in lines
    per_row = 2 * 2 * 32 * 4  # key and value, layers, width, float32
    assert f"20 {per_row * 20 / 1000:.2f} kB {per_row * 20 / 1000:.2f} kB" in lines
    # An open window, one set aside, and 8 summaries for each of two windows; against 64 keys and values.
    assert f"64 {per_row * (32 + 32 + 16) / 1000:.2f} kB {per_row * 64 / 1000:.2f} kB" in lines


@pytest.mark.parametrize("context", [5, 31, 32, 63, 64, 100, 127])
def test_cache_bytes_is_what_a_cache_holds(context):
    cache = DynamicCache(config=MODEL.config)
    MODEL(torch.full((1, context), 100), past_key_values=cache)
    layer = cache.layers[0]
    rows = layer.open_tokens[0] + layer.summaries[0] + sum(keys.shape[1] for keys, _ in layer.closed_windows[0])
    held = rows * 2 * 2 * 32 * 4
    most = cache_bytes(MODEL.config, context, item_size=4)
    assert held <= most
    if context % 32 == 31:  # the fullest an open window gets
        assert most - held in (0, 2 * 2 * 32 * 4)


# -- demo --------------------------------------------------------------------------------------------------------------


def test_demo(folder, capsys, monkeypatch):
    monkeypatch.setattr("evabyte.cli.model.bundled_checkpoint", lambda: folder)
    assert main(["demo", PROMPT, "-n", "40"]) == 0
    out = capsys.readouterr().out
    assert "The same 40 bytes; multibyte decoding was" in out
    assert out.count(PROMPT + continuation(TOKENIZER.encode(PROMPT), max_new_tokens=40)) == 2


def test_compare_says_where_texts_part():
    one, other = (Generation(ids, forwards=3, seconds=1.0, cache=None) for ids in ([1, 2, 3], [1, 2, 4]))
    assert compare(one, other).startswith("The first 2 bytes are the same; then")


# -- mistakes and the process ------------------------------------------------------------------------------------------


def test_bundled_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no bundled model"):
        bundled_checkpoint(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    assert bundled_checkpoint(tmp_path) == tmp_path / "small"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "x", "--temperature", "-1"], "a number, at least 0, not '-1'"),
        (["generate", "x", "--temperature", "nan"], "a number, at least 0"),
        (["generate", "x", "--max-new-tokens", "0"], "a whole number, at least 1"),
        (["generate", "x", "--top-p", "0"], "a number above 0"),
        (["generate", "x", "--draft", "tree5"], "tree5"),
        (["generate", "x", "--device", "cuda:77", "--model", "MODEL"], "--device cuda:77"),
        (["generate", "x", "--model", "no such folder"], "no folder no such folder"),
        (["generate", "x", "--model", "EMPTY"], "no config.json"),
        (["generate", "x", "--model", "MODEL/config.json"], "is a file"),
        (["generate", "x", "--model", "nobody/nothing"], "Hub"),
        (["generate", "x", "--model", "LLAMA"], "'llama'"),
        (["generate", "x", "--model", "BROKEN"], "cannot load"),
        (["info", "BROKEN"], "BROKEN"),
        (["info", "CONFIG_ONLY"], "model.safetensors"),
        (["generate", "x", "--model", "CONFIG_ONLY"], "cannot load"),
        (["tell", "x"], "tell"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, folder, tmp_path, capsys):
    (tmp_path / "EMPTY").mkdir()
    for name in ("LLAMA", "BROKEN", "CONFIG_ONLY"):
        (tmp_path / name).mkdir()
        MODEL.config.save_pretrained(tmp_path / name)
    (tmp_path / "LLAMA" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "BROKEN" / "model.safetensors").write_bytes(b"not weights")
    replaced = [re.sub("EMPTY|LLAMA|BROKEN|CONFIG_ONLY", lambda match: str(tmp_path / match[0]), a) for a in arguments]
    replaced = [argument.replace("MODEL", folder) for argument in replaced]
    try:
        status = main(replaced)
    except SystemExit as exit_:
        status = exit_.code
    written = capsys.readouterr()
    assert (status, written.out) == (2, "")
    assert message in written.err
    assert written.err.startswith("evabyte") and written.err.count("\n") == 1


def test_version_and_no_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"evabyte {__version__}\n"
    assert main([]) == 2
    assert "generate" in capsys.readouterr().out


def test_a_reader_that_leaves_ends_the_process_quietly(folder):
    command = [sys.executable, "-m", "evabyte", "generate", PROMPT, "--model", folder, *GREEDY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read()
    assert b"Traceback" not in said and b"pipe" not in said.lower()  # libraries may have their say at import
    assert process.wait() == PIPE_CLOSED
