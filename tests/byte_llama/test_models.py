"""What the in-tree parents can do, the byte-level models can: training, recording, casting, compiling."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from small_models import KINDS, SUBWORDS, dictionary, fresh_model, letters, logits_alone, tiny_model
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from byte_llama import ByteGemma2Config, ByteGemma2Model, ByteLlamaConfig, ByteLlamaForCausalLM, ByteLlamaModel

PARENTS = {"llama": (LlamaConfig, LlamaForCausalLM), "gemma2": (Gemma2Config, Gemma2ForCausalLM)}


def parent_of(kind, model):
    """The in-tree model with the same weights, and the inputs that the byte-level one would give it."""
    config_class, model_class = PARENTS[kind]
    known = config_class().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    config = config_class(**{name: value for name, value in model.config.to_dict().items() if name in known})
    parent = model_class(config).eval()
    parent.set_attn_implementation("eager")
    parent.load_state_dict(model.state_dict(), strict=False)
    return parent


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_parents(kind):
    model, ids = fresh_model(kind).train(), letters(2, 20)
    model.set_attn_implementation("eager")
    labels = ids.masked_fill(torch.arange(20) % 5 == 0, -100)
    arguments = {"labels": labels, "num_items_in_batch": torch.tensor(50)}
    output = model(ids, **arguments)
    output.loss.backward()

    parent, decoder = parent_of(kind, model).train(), model.model
    expansion = decoder.subword_expansion
    embeddings = (
        decoder.embed_tokens(ids) + decoder.expand_embed_tokens(expansion(expansion.as_symbols(ids)))
    ).detach()
    expected = parent(inputs_embeds=embeddings.requires_grad_(), **arguments)
    expected.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss)
    for name, parameter in parent.named_parameters():
        if "embed_tokens" not in name and "lm_head" not in name:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    rows = decoder.expand_embed_tokens.weight.grad.norm(dim=-1) > 0
    assert set(rows.nonzero().flatten().tolist()) <= set(expansion(expansion.as_symbols(ids)).unique().tolist())
    assert rows.sum() > 5


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind):
    gradients = []
    for checkpointing in (False, True):
        model = fresh_model(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(letters(2, 12), labels=letters(2, 12)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs_that_can_be_asked_for(kind):
    model, ids = fresh_model(kind), letters(2, 9)
    model.set_attn_implementation("eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and output.hidden_states[0].shape == (2, 9, 32)
    assert len(output.attentions) == 2 and output.attentions[0].shape == (2, 2, 9, 9)
    as_tuple = model(ids, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)
    last = model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, output.logits[:, -1:])
    hidden = model.model(ids).last_hidden_state
    assert hidden.shape == (2, 9, 32)


@torch.no_grad()
def test_attentions_with_normed_queries():
    model = fresh_model(add_qk_norm=True)
    model.set_attn_implementation("eager")
    assert len(model(letters(1, 4), output_attentions=True).attentions) == 2
    plans = ByteLlamaConfig(add_qk_norm=True).base_model_tp_plan.keys() - ByteLlamaConfig().base_model_tp_plan.keys()
    assert plans == {"layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"}


@pytest.mark.parametrize("kind", KINDS)
def test_plans_and_registrations_are_the_parents(kind):
    model = tiny_model(kind)
    parent = parent_of(kind, model)
    assert parent._tp_plan.items() <= model._tp_plan.items() and parent._pp_plan == model._pp_plan
    assert model._no_split_modules == parent._no_split_modules
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_decoder() is model.model and model.base_model is model.model
    assert model._supports_flash_attn and model._can_compile_fullgraph


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_casting_leaves_the_table_alone(kind, dtype):
    model = fresh_model(kind)
    before = {name: tensor.clone() for name, tensor in model.model.subword_expansion.named_buffers()}
    ids = letters(2, 30)
    expected = model(ids).logits
    model.to(dtype)
    for name, tensor in model.model.subword_expansion.named_buffers():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    logits = model(ids).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_the_same(kind):
    model, ids = tiny_model(kind), letters(1, 20)
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_more_byte_ids_than_the_table_knows():
    model, ids = fresh_model(), letters(1, 12)
    expected = logits_alone(model, ids[0])
    model.resize_token_embeddings(model.config.vocab_size + 5)
    new = model.config.vocab_size - 1
    logits = logits_alone(model, torch.cat((ids[0], torch.tensor([new, 0]))))
    torch.testing.assert_close(logits[:12, : expected.shape[1]], expected)


def test_every_head_is_resized():
    model, ids = fresh_model(num_pred_heads=3), letters(1, 12)
    before = model(ids, return_all_pred_logits=True).logits
    model.resize_token_embeddings(model.config.vocab_size + 5)
    after = model(ids, return_all_pred_logits=True).logits
    torch.testing.assert_close(after[..., : before.shape[-1]], before)
    assert after.shape == (*before.shape[:-1], before.shape[-1] + 5)


def test_a_configuration_is_complete_until_a_model_has_its_dictionary(tmp_path):
    original = fresh_model().config
    config = ByteLlamaConfig(**{**original.to_dict(), "expand_table_sizes": None}, expand_input_ids_dict=dictionary())
    config.save_pretrained(tmp_path)
    again = ByteLlamaConfig.from_pretrained(tmp_path)
    assert again.expand_input_ids_dict == config.expand_input_ids_dict
    assert '"expand_input_ids_dict": null' in repr(again)  # too long to print
    ByteLlamaModel(again).config.save_pretrained(tmp_path)
    assert ByteLlamaConfig.from_pretrained(tmp_path).expand_input_ids_dict is None


def test_compiled_steps_get_masks_of_one_layout():
    model, ids = fresh_model(), letters(2, 9)
    masks = [torch.ones(2, length, dtype=torch.int64) for length in (9, 10)]
    given = [model.prepare_inputs_for_generation(ids[:, -1:], attention_mask=mask)["token_mask"] for mask in masks]
    assert given[0].stride() == given[1].stride()


def test_made_from_a_configuration():
    config = fresh_model().config
    for _ in range(2):  # the configuration keeps its dictionary
        model = ByteLlamaForCausalLM(config)
        assert model.model.subword_expansion.edges.max() > 0
    assert type(ByteLlamaModel(config)).__name__ == "ByteLlamaModel"
    with torch.device("meta"):
        assert ByteLlamaForCausalLM(config).model.subword_expansion.edges.is_meta


def test_tied_output():
    for kind in KINDS:
        model = fresh_model(kind, tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight


EXPANSION = {"expand_input_ids": True, "expand_input_ids_vocab_size": SUBWORDS, "expand_input_ids_dict": dictionary()}


@pytest.mark.parametrize("config_class", [ByteLlamaConfig, ByteGemma2Config])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expand_input_ids_dict": None}, "expand_input_ids_dict"),
        ({"expand_input_ids_vocab_size": None}, "expand_input_ids_vocab_size"),
        ({"expand_input_ids_maxlen": None}, "expand_input_ids_maxlen"),
    ],
)
def test_configurations_that_lack_something(config_class, changes, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        config_class(**{**EXPANSION, **changes})


def test_a_dictionary_beyond_the_embedding():
    with pytest.raises(ValueError, match=r"subword id 49.*vocab_size` is 49"):
        fresh_model(expand_input_ids_vocab_size=49)


@pytest.mark.parametrize("arguments", [{}, {"input_ids": letters(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)}])
def test_ids_or_embeddings(arguments):
    with pytest.raises(ValueError, match="exactly one"):
        tiny_model()(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_compiles_as_one_graph(kind):
    """The whole model, with padding, and prefill and decoding on a static cache that is made within the graph."""
    model, ids = fresh_model(kind), letters(2, 24)
    compiled = torch.compile(model, fullgraph=True)
    expected = model(ids).logits
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    cache = StaticCache(model.config, max_cache_len=24)
    pieces = [ids[:, :10], *ids[:, 10:].split(1, dim=1)]
    logits = torch.cat([compiled(piece, past_key_values=cache).logits for piece in pieces], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_exports():
    model, ids = fresh_model(), letters(1, 24)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(ids, use_cache=False).logits, model(ids).logits)


def test_decoders_are_registered():
    from transformers import AutoModel, AutoModelForCausalLM

    config = tiny_model("gemma2").config
    assert type(AutoModel.from_config(config)) is ByteGemma2Model
    assert type(AutoModelForCausalLM.from_config(config)) is type(tiny_model("gemma2"))
