"""Merged checkpoints compute what averaged weights compute; what cannot be averaged is refused before any work."""

import importlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import fresh_model, random_ids
from torch.utils._python_dispatch import TorchDispatchMode

from evabyte import EvaByteForCausalLM, EvaByteTokenizer, merging
from evabyte.cli import main
from evabyte.merging import merge_checkpoints

WINDOW = {"window_size": 16, "chunk_size": 4}


@pytest.fixture
def small_models(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "byte_llama")
    return importlib.import_module("small_models")


def another(model, seed):
    """The same model with other weights, near the first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)
    return model


def saved(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Three EvaByte folders, cut into files in three ways."""
    base = tmp_path_factory.mktemp("originals")
    models = [another(fresh_model(), seed) for seed in range(3)]
    return [
        saved(model, base / name, max_shard_size=size)
        for model, name, size in zip(models, "abc", ("30KB", "5GB", "60KB"), strict=True)
    ]


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def averaged_by_hand(models, weights):
    """The first model with all floating-point weights averaged in float64."""
    states = [model.state_dict() for model in models]
    average = {
        name: sum(weight * state[name].double() for weight, state in zip(weights, states, strict=True)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }
    models[0].load_state_dict(average)
    return models[0]


# -- what is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [1.5, -0.25, -0.25]])
def test_merged_evabyte_computes_what_averaged_weights_compute(originals, tmp_path, weights):
    merge_checkpoints(originals, tmp_path / "out", weights)
    merged = EvaByteForCausalLM.from_pretrained(tmp_path / "out")
    by_hand = averaged_by_hand([*map(EvaByteForCausalLM.from_pretrained, originals)], weights or [1 / 3] * 3)
    ids = random_ids(2, 40)
    with torch.no_grad():
        logits, expected = (m(ids, return_all_pred_logits=True).logits for m in (merged, by_hand))
        other = EvaByteForCausalLM.from_pretrained(originals[0])(ids, return_all_pred_logits=True).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (other - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_byte_llama_computes_what_averaged_weights_compute(small_models, tmp_path, kind, tied):
    heads = 1 if tied else 3
    models = [
        another(small_models.fresh_model(kind, tie_word_embeddings=tied, num_pred_heads=heads), n) for n in (0, 1)
    ]
    folders = [
        saved(model, tmp_path / name, max_shard_size=size)
        for model, name, size in zip(models, "ab", ("5GB", "20KB"), strict=True)
    ]
    merge_checkpoints(folders, tmp_path / "out", [0.25, 0.75])
    merged = type(models[0]).from_pretrained(tmp_path / "out").eval()
    ids = small_models.letters(2, 30)
    assert ("lm_head.weight" in tensors_of(tmp_path / "out")) != tied
    assert (merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()) == tied
    expected = averaged_by_hand(models, [0.25, 0.75])(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=15)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    block=st.sampled_from([1, 7, 1000]),
)
def test_average_is_exact_to_rounding_and_of_equals_the_identity(weights, dtype, block):
    weights = [weight / sum(weights) for weight in weights]
    generator = torch.Generator().manual_seed(len(weights))
    tensors = [torch.randn(50, generator=generator, dtype=torch.float64).to(dtype) for _ in weights]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "BLOCK", block)
        average = torch.cat(list(merging._average(tensors, weights)))
        same = torch.cat(list(merging._average([tensors[0]] * len(weights), weights)))
    exact = sum(weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True))
    assert average.dtype == dtype
    torch.testing.assert_close(average, exact.to(dtype), atol=1e-6, rtol=2 * torch.finfo(dtype).eps)
    assert torch.equal(same, tensors[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_merged_with_itself_is_itself(small_models, tmp_path, dtype):
    folder = saved(another(small_models.fresh_model(), 0).to(dtype), tmp_path / "model", max_shard_size="20KB")
    merge_checkpoints([folder] * 3, tmp_path / "out", [0.3, 0.3, 0.4])
    files = sorted(path.name for path in folder.glob("model*"))
    assert len(files) > 2 and files == sorted(path.name for path in (tmp_path / "out").glob("model*"))
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()


def test_every_kind_of_tensor(tmp_path):
    """Scalars, empty tensors, integers and bools; float64 in its own precision; names in another order."""
    folders = []
    for name, value in (("a", 1.0), ("b", 1.0 + 2**-40)):
        tensors = {
            "scalar": torch.tensor(value),
            "empty": torch.zeros(0, 4),
            "double": torch.full((3, 2), value, dtype=torch.float64),
            "index": torch.arange(5),
            "mask": torch.tensor([True, False]),
            "half": torch.full((3,), 1 + (name == "b"), dtype=torch.float16),
        }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file(dict(sorted(tensors.items(), reverse=name == "b")), folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    merge_checkpoints(folders, tmp_path / "out")
    merged, first = tensors_of(tmp_path / "out"), tensors_of(folders[0])
    assert merged.pop("double").eq(1 + 2**-41).all() and merged.pop("half").eq(1.5).all()
    assert all(torch.equal(tensor, first[name]) for name, tensor in merged.items())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


class AnonymousMemory(TorchDispatchMode):
    """Most memory beyond that of mapped files, in bytes, seen after any operation."""

    most = 0

    @staticmethod
    def now():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.most = max(self.most, self.now())
        return result


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
def test_memory_is_that_of_some_blocks(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        large = {"large": torch.ones(2**24, dtype=torch.bfloat16), "index": torch.ones(2**22, dtype=torch.int64)}
        save_file(large, tmp_path / name / "model.safetensors")
    del large
    with AnonymousMemory() as memory:
        before = memory.now()
        merge_checkpoints([tmp_path / name for name in "abc"], tmp_path / "out")
    assert memory.most > 0
    # Less than half of the largest tensor of one checkpoint; blocks and the first use of libraries take some MB.
    assert memory.most - before < 2**24
    assert tensors_of(tmp_path / "out")["large"].eq(1).all()


# -- what is written ---------------------------------------------------------------------------------------------------


def test_the_folder_is_the_first_ones(originals, tmp_path):
    first = shutil.copytree(originals[0], tmp_path / "first")
    EvaByteTokenizer().save_pretrained(first)
    card = "---\nlicense: apache-2.0\ntags:\n- bytes\n---\n\n# A model\n\nScores 12.\n"
    (first / "README.md").write_text(card)
    (first / "training_log.json").write_text("{}")
    (first / "optimizer.pt").write_bytes(b"")
    merge_checkpoints([first, originals[1]], tmp_path / "out", [3, 1], normalize=True)

    left_out = {"training_log.json", "optimizer.pt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in first.iterdir()} - left_out
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (first / name).read_bytes()
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith(card[: card.index("# A model")]) and text.endswith("# A model\n\nScores 12.\n")
    assert "- 0.75 x `first`\n- 0.25 x `b`\n" in text and str(tmp_path) not in text


def test_a_folder_without_a_card_gets_one(originals, tmp_path):
    first = shutil.copytree(originals[0], tmp_path / "a")
    (first / "README.md").unlink()
    merge_checkpoints([first, originals[1]], tmp_path / "deep" / "out")
    text = (tmp_path / "deep" / "out" / "README.md").read_text()
    assert "- 0.5 x `a`\n- 0.5 x `b`\n\n# out\n" in text


# -- what is refused ---------------------------------------------------------------------------------------------------


def edited(folder, target, **config):
    """A copy of a folder with another configuration."""
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    return target


def rewritten(folder, target, change):
    """A copy of a one-file folder whose tensors were changed in place."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def refused(folders, output, match, error=ValueError, **arguments):
    existed = output.exists()
    with pytest.raises(error, match=match):
        merge_checkpoints(folders, output, **arguments)
    assert output.exists() == existed


@pytest.mark.parametrize(
    "weights, normalize, match",
    [
        ([0.5], False, "2, got 1"),
        ([0.5, 0.6], False, "sum to 1, not 1.1.*normalize"),
        ([1.0, -1.0], True, "sum is not 0"),
        ([float("nan"), 1.0], False, "finite"),
        ([float("inf"), float("-inf")], True, "finite"),
    ],
)
def test_weights_that_do_not_fit(originals, tmp_path, weights, normalize, match):
    refused(originals[:2], tmp_path / "out", match, weights=weights, normalize=normalize)


def test_other_architectures(originals, tmp_path, small_models):
    _, one_file, _ = originals
    other = edited(one_file, tmp_path / "window", window_size=32)
    refused([one_file, other], tmp_path / "out", r"different architectures: window_size \(16 and 32\)")
    llama = saved(small_models.fresh_model(), tmp_path / "llama")
    refused([one_file, llama], tmp_path / "out", "architectures.*EvaByteForCausalLM.*ByteLlamaForCausalLM")
    wider = saved(fresh_model(intermediate_size=64), tmp_path / "wider")
    config = json.loads((one_file / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config))
    match = r"shapes: model.layers.0.mlp.down_proj.weight \(\[32, 48\] and \[32, 64\]\).* and 3 more"
    refused([one_file, wider], tmp_path / "out", match)


def test_configurations_may_differ_in_what_weights_do_not_see(originals, tmp_path):
    tuned = edited(originals[1], tmp_path / "tuned", eos_token_id=11, transformers_version="4.47.1", rope_theta=1e5)
    merge_checkpoints([originals[1], tuned], tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(originals[1]).keys()


def test_other_tensors(originals, tmp_path):
    _, one_file, _ = originals
    lacking = rewritten(one_file, tmp_path / "lacking", lambda tensors: tensors.pop("lm_head.weight"))
    refused([one_file, lacking], tmp_path / "out", "lacking lacks tensors of .*: lm_head.weight")
    refused([lacking, one_file], tmp_path / "out", "lacking lacks tensors of .*: lm_head.weight")

    def in_half(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

    half = rewritten(one_file, tmp_path / "half", in_half)
    refused([one_file, half], tmp_path / "out", r"model.norm.weight \(F32 and F16\)\. Convert .*dtype=")

    def quantised(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)

    eight_bits = rewritten(one_file, tmp_path / "eight_bits", quantised)
    refused([eight_bits] * 2, tmp_path / "out", r"quantised.*model.norm.weight \(F8_E4M3\)")


def test_integers_that_differ_are_named(small_models, tmp_path):
    folder = saved(small_models.fresh_model(), tmp_path / "model")

    def other_table(tensors):
        tensors["model.subword_expansion.edges"][0] += 1

    other = rewritten(folder, tmp_path / "other", other_table)
    refused([folder, other], tmp_path / "out", "integer tensors.*: model.subword_expansion.edges. ")


def test_folders_that_are_no_checkpoints(originals, tmp_path):
    _, one_file, _ = originals
    refused([one_file, tmp_path / "nothing"], tmp_path / "out", "nothing is not a checkpoint", FileNotFoundError)
    refused([one_file], tmp_path / "out", "at least two")
    weightless = shutil.copytree(one_file, tmp_path / "weightless")
    os.remove(weightless / "model.safetensors")
    refused([one_file, weightless], tmp_path / "out", "no safetensors weights", FileNotFoundError)
    cut = shutil.copytree(one_file, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((one_file / "model.safetensors").read_bytes()[:-4])
    refused([one_file, cut], tmp_path / "out", "damaged or cut short", OSError)


@pytest.mark.parametrize("damage", ["unknown name", "unknown file", "file elsewhere"])
def test_an_index_that_does_not_fit(originals, tmp_path, damage):
    copy = shutil.copytree(originals[0], tmp_path / "copy")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    names, file = index["weight_map"], "model-00001-of-00005.safetensors"
    if damage == "unknown name":
        names["no.such.weight"] = file
    else:
        elsewhere = f"../{file}" if damage == "file elsewhere" else "gone.safetensors"
        (copy / file).rename(tmp_path / file)
        index["weight_map"] = {name: elsewhere if held == file else held for name, held in names.items()}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused([originals[1], copy], tmp_path / "out", "does not fit the files|gone.safetensors", (ValueError, OSError))


def test_output_that_is_there(originals, tmp_path):
    (tmp_path / "file").write_text("")
    refused(originals, tmp_path / "file", "is a file", FileExistsError)
    refused(originals, originals[0], "is not empty", FileExistsError)
    (tmp_path / "empty").mkdir()
    merge_checkpoints(originals, tmp_path / "empty")


# -- the command -------------------------------------------------------------------------------------------------------


def test_command(originals, tmp_path, capsys):
    folders = [str(folder) for folder in originals[:2]]
    weights = ["--weights", "3", "-1"]
    assert main(["merge", *folders, "--output", str(tmp_path / "out"), *weights]) == 2
    assert re.fullmatch(r"evabyte merge: `weights` must sum to 1, not 2.*\n", capsys.readouterr().err)
    assert main(["merge", *folders, *weights, "--normalize", "--output", str(tmp_path / "out")]) == 0
    assert re.fullmatch(rf"{tmp_path / 'out'}: [\d.]+ kB in \d+ s\n", capsys.readouterr().out)
    merge_checkpoints(folders, tmp_path / "expected", [1.5, -0.5])
    merged, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
