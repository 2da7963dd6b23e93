"""A run from a file: models on disk, text, checkpoints, the trained student."""

import json

import pytest
import torch
import yaml
from test_trainer import SIZES, TEXTS, parts, student  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from byte_llama.cli import main
from byte_llama.distillation import Recipe, distill


@pytest.fixture
def recipe(parts, tmp_path):  # noqa: F811
    teacher, subword, byte, _ = parts
    teacher.save_pretrained(tmp_path / "teacher")
    subword.save_pretrained(tmp_path / "teacher")
    student(byte, heads=1).save_pretrained(tmp_path / "student")
    byte.save_pretrained(tmp_path / "student")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "heldout.txt").write_text(TEXTS[3] + "\n" + TEXTS[9])
    training = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    given = {
        "student": str(tmp_path / "student"),
        "teacher": str(tmp_path / "teacher"),
        "output": str(tmp_path / "run"),
        "train": str(tmp_path / "train.jsonl"),
        "heldout": str(tmp_path / "heldout.txt"),
        "teacher_dtype": "float32",
        "student_length": 96,
        "teacher_length": 48,
        "losses": ["sft", "alm", "latents", "heads"],
        "num_pred_heads": 3,
        "sample_prompts": ["The quick"],
        "sample_bytes": 5,
        "training": {"per_device_train_batch_size": 4, **training},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


def test_from_file_to_student(recipe, tmp_path):
    trainer = distill(Recipe.from_file(recipe))
    history = trainer.state.log_history
    assert [entry["eval_bits_per_byte"] > 0 for entry in history if "eval_bits_per_byte" in entry] == [True] * 2
    assert [entry["sample"].startswith("The quick") for entry in history if "sample" in entry] == [True] * 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert model.config.num_pred_heads == 3 and tokenizer.decode(tokenizer("ä").input_ids[-2:]) == "ä"

    longer = Recipe.from_file(recipe, training={**Recipe.from_file(recipe).training, "max_steps": 6})
    resumed = distill(longer, resume=True)
    assert resumed.state.global_step == 6


@pytest.mark.parametrize(
    "own",
    [{}, {"packed": True}, {"eva_layers": "all", "eva_window_size": 16, "eva_chunk_size": 4}],
    ids=["padded", "packed", "eva"],
)
def test_adapters_are_merged(recipe, tmp_path, own):
    pytest.importorskip("peft")
    run = Recipe.from_file(recipe, lora={"r": 2}, losses=["sft", "latents"], sample_prompts=[], **own)
    trainer = distill(run)
    adapted = trainer.accelerator.unwrap_model(trainer.model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    ids = torch.tensor([[72, 101, 108] * 10])
    learned = [weight for name, weight in again.named_parameters() if ".summary." in name]
    assert bool(learned) == bool(own.get("eva_layers")) and all(weight.any() for weight in learned)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted.to("cpu").eval()(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.compatibility("Byteification (distillation)", "byte Llama")
def test_eva_layers_learn_and_resume(recipe, tmp_path):
    """All losses at once, from a student with full attention; the run goes on where it stopped."""
    eva = {"eva_layers": [1], "eva_window_size": 16, "eva_chunk_size": 4, "sample_prompts": []}
    distill(Recipe.from_file(recipe, **eva))
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert final.config.eva_layers == [1] and final.config.num_pred_heads == 3
    assert final.model.layers[1].self_attn.summary.adaptive_mu_k.any()
    longer = {**Recipe.from_file(recipe).training, "max_steps": 6}
    assert distill(Recipe.from_file(recipe, **eva, training=longer), resume=True).state.global_step == 6


def test_the_command(recipe, tmp_path, capsys):
    short = ["--set", "training.max_steps=1", "--set", "losses=[sft]", "--set", "sample_prompts=[]"]
    assert main(["distill", "--config", str(recipe), *short]) == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert "final" in capsys.readouterr().out.splitlines()[-1]
    assert main(["distill", "--config", str(recipe), "--set", "losses=[kl]"]) == 2
    assert main(["distill", "--config", str(tmp_path / "absent.yaml")]) == 2
    assert main(["distill", "--config", str(recipe), "--set", "losses"]) == 2
    capsys.readouterr()
    assert main(["distill", "--config", str(recipe), "--set", "eva_layers=[2]"]) == 2
    assert "`eva_layers` must be 'all' or numbers in 0..1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"loses": ["sft"]}, "no loses"),
        ({"losses": ["kl"]}, "kl"),
        ({"train": None}, "lacks train"),
        ({"training": {}}, "max_steps"),
        ({"freeze_trunk": True}, "losses"),
        ({"teacher_dtype": "float33"}, "teacher_dtype"),
    ],
)
def test_wrong_recipes_are_refused(recipe, wrong, said):
    with pytest.raises(ValueError, match=said):
        Recipe.from_file(recipe, **wrong)
