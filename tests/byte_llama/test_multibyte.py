"""Multibyte generation of byte-level models: the same bytes as `generate`, whatever drafts them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, VOCABULARY, fresh_model

from byte_llama.self_speculation import SkipLayersDrafter, layers_to_skip, without_layers
from byte_llama.subword_drafter import SubwordDrafter
from evabyte.drafters import LookupDrafter, UnionDrafter

DRAFTS = ["chain", "dynamic", "lookup", "dynamic+lookup"]


def with_heads(kind, heads=4, **overrides):
    """A small model with random heads."""
    return fresh_model(kind, num_pred_heads=heads, **overrides)


def padded_rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(0, 4, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return torch.where(mask.bool(), ids, 6), mask


@settings(max_examples=15)
@given(
    kind=st.sampled_from(KINDS),
    draft=st.sampled_from(DRAFTS),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_greedy_equals_generate(kind, draft, lengths, seed):
    model = with_heads(kind)
    ids, mask = padded_rows(lengths, seed)
    how = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False}
    assert torch.equal(model.multi_byte_generate(ids, draft=draft, **how), model.generate(ids, **how))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_one_seed_one_text(kind, draft):
    model = with_heads(kind)
    ids, _ = padded_rows([9])
    how = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.8, "top_k": 5, "eos_token_id": None}
    torch.manual_seed(1)
    expected = model.generate(ids, **how)
    torch.manual_seed(1)
    assert torch.equal(model.multi_byte_generate(ids, draft=draft, **how), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_without_heads(kind):
    """Training-free drafts: what the vocabulary knows, and what stood in the text before."""
    model = fresh_model(kind, vocab_size=40)  # with an id for the space that ends a word
    ids, mask = padded_rows([12, 5])
    how = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    expected = model.generate(ids, **how)
    subwords = SubwordDrafter([bytes([a, b, c]) for a in range(4) for b in range(4) for c in range(4)])
    for draft in (None, subwords, UnionDrafter(subwords, LookupDrafter(suffixes=(2, 1)))):
        assert torch.equal(model.multi_byte_generate(ids, draft=draft, **how), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft", ["subword", "subword+lookup", "self", "self+lookup"])
def test_drafters_by_name(kind, draft):
    model = fresh_model(kind, num_hidden_layers=3, vocab_size=40)
    model.skip_layers([1])
    ids, mask = padded_rows([12, 5, 1])
    how = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False}
    assert torch.equal(model.multi_byte_generate(ids, draft=draft, **how), model.generate(ids, **how))
    one = {"max_new_tokens": 20, "do_sample": True, "eos_token_id": None}
    torch.manual_seed(1)
    expected = model.generate(ids[:1], **one)
    torch.manual_seed(1)
    assert torch.equal(model.multi_byte_generate(ids[:1], draft=draft, **one), expected)


def test_the_layers_that_matter_least_are_skipped():
    model = fresh_model("llama", num_hidden_layers=4)
    with torch.no_grad():
        for number in (1, 2):  # these add nothing
            model.model.layers[number].self_attn.o_proj.weight.zero_()
            model.model.layers[number].mlp.down_proj.weight.zero_()
    ids, _ = padded_rows([40])
    assert layers_to_skip(model, ids, 2) == [1, 2]
    # Without them the model is the same, so that all it drafts is accepted.
    model.skip_layers([1, 2])
    drafter = SkipLayersDrafter(model, [1, 2], length=5, min_probability=0.0)
    how = {"max_new_tokens": 19, "do_sample": False, "eos_token_id": None}
    output, counts = model.multi_byte_generate(ids, draft=drafter, return_acc_lengths=True, **how)
    assert counts.tolist() == [[1, 6, 6, 6]]
    assert torch.equal(output, model.generate(ids, **how))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_come_back(kind):
    model, (ids, _) = fresh_model(kind), padded_rows([9])
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(RuntimeError), without_layers(model, [0]):
            assert not torch.equal(model(ids).logits, expected)
            raise RuntimeError
        assert torch.equal(model(ids).logits, expected)


def test_drafts_are_accepted():
    """A drafter that knows the text brings it in few forwards."""
    model = fresh_model("llama")
    ids, _ = padded_rows([6])
    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    text = model.generate(ids, **how)[0].tolist()

    class Knows:
        def draft(self, context):
            place = len(context.texts[0])
            known = torch.tensor([text[place : place + 7]])
            lone = LookupDrafter().draft(context)
            return lone.with_chains(known, torch.tensor([known.shape[1]]), 0)

    output, counts = model.multi_byte_generate(ids, draft=Knows(), return_acc_lengths=True, **how)
    assert output[0].tolist() == text
    assert counts.tolist() == [[1, 8, 8, 7]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_goes_on(kind):
    model = with_heads(kind)
    ids, _ = padded_rows([11])
    how = {"do_sample": False, "eos_token_id": None}
    first = model.multi_byte_generate(ids, max_new_tokens=15, return_dict_in_generate=True, **how)
    longer = torch.cat((first.sequences, ids[:, :4]), dim=1)
    cache = first.past_key_values
    assert torch.equal(
        model.generate(longer, past_key_values=cache, max_new_tokens=10, **how),
        model.generate(longer, max_new_tokens=10, **how),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["behind", "within", "by mask"])
def test_a_generation_config_leaves_other_padding_to_generate(kind, padding):
    """A padding id that no mask explains is padding to `generate`, wherever it stands."""
    model, how = with_heads(kind), {"max_new_tokens": 12, "do_sample": False}
    ids, mask = padded_rows([9, 5])
    if padding == "by mask":
        ids, how["attention_mask"] = ids.flip(1), mask.flip(1)
    else:
        ids[0, -1 if padding == "behind" else 4] = 6
    expected = model.generate(ids, **how)
    model.generation_config.multibyte = True
    assert torch.equal(model.generate(ids, **how), expected)
    assert torch.equal(model.generate(input_ids=ids, **how), expected)
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(ids, multibyte=True, **how)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_learn_alone(kind):
    model = fresh_model(kind)
    trunk = {name: p.clone() for name, p in model.named_parameters()}
    model.add_prediction_heads(3)
    ids = torch.randint(0, 4, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = model(ids).logits
        copies = model(ids, return_all_pred_logits=True).logits
    assert copies.shape == (2, 24, 3, VOCABULARY)
    torch.testing.assert_close(copies, own[:, :, None].expand_as(copies))
    model.train().freeze_trunk()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        output = model(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.head_losses.detach())
    assert losses[-1][1:].max() < 0.7 * losses[0][1:].min() and torch.equal(losses[-1][0], losses[0][0])
    assert all(torch.equal(p, trunk[name]) for name, p in model.named_parameters() if name in trunk)


def test_head_losses_are_cross_entropies():
    model = with_heads("llama", heads=3)
    ids = torch.randint(0, 4, (2, 15), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, labels=labels)
    logits = model(ids, attention_mask=mask, position_ids=positions, return_all_pred_logits=True).logits
    for head in range(3):
        ahead, rows = head + 1, [(0, 4), (1, 0)]
        picked = torch.cat([logits[row, start : 15 - ahead, head] for row, start in rows])
        target = torch.cat([ids[row, start + ahead :] for row, start in rows])
        expected = torch.nn.functional.cross_entropy(picked, target)
        torch.testing.assert_close(output.head_losses[head], expected)
    torch.testing.assert_close(output.loss, output.head_losses.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_saved(kind, tmp_path):
    model = with_heads(kind, pred_head_kind="linear")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    ids = torch.randint(0, 4, (1, 9))
    with torch.no_grad():
        expected = model(ids, return_all_pred_logits=True).logits
        assert torch.equal(again(ids, return_all_pred_logits=True).logits, expected)


def test_what_cannot_be_is_named():
    model = with_heads("llama")
    with pytest.raises(ValueError, match="already"):
        model.add_prediction_heads(3)
    with pytest.raises(ValueError, match="num_pred_heads"):
        fresh_model("llama").add_prediction_heads(1)
    tree = torch.ones(1, 2, 2, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="skip_layers"):
        model.make_drafter("self", 1)
    with pytest.raises(ValueError, match="count"):
        layers_to_skip(model, torch.zeros(1, 3).long(), 2)
    with pytest.raises(ValueError, match="layers in 0"):
        model.skip_layers([7])
    with pytest.raises(ValueError, match="TreeCache"):
        model(torch.zeros(1, 2).long(), draft_tree=tree)
