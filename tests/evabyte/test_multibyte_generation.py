"""Multibyte decoding is `generate`, byte for byte; the reference's runs too."""

import pytest
import torch
from goldens_io import load_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import pad_left, random_ids, tiny_model
from transformers import StoppingCriteria, TextStreamer

from evabyte import EvaByteTokenizer
from evabyte.byte_tree import TreeShape, published_tree
from evabyte.multibyte_generation import multibyte_decoding


def test_trees_of_the_reference():
    golden = load_golden("multibyte_w256_c8")
    for name, facts in golden.facts["trees"].items():
        tree = TreeShape.from_paths(facts["choices"])
        assert torch.equal(tree.mask.to(torch.uint8), golden[f"out.tree.{name}.medusa_attn_mask"][0])
        assert torch.equal(tree.depths, golden[f"out.tree.{name}.medusa_position_ids"][0])
    assert published_tree("tree95") == TreeShape.from_paths(golden.facts["trees"]["tree95"]["choices"])
    assert published_tree("tree31") == TreeShape.from_paths(golden.facts["trees"]["tree31"]["choices"])


def test_runs_of_the_reference():
    golden = load_golden("multibyte_w256_c8")
    model = golden.model()
    for call in golden.facts["calls"]:
        ids, lengths = model.multi_byte_generate(
            golden[call["prompt"]],
            max_new_tokens=call["max_new_tokens"],
            medusa_choices=golden.facts["trees"][call["tree"]]["choices"],
            eos_token_id=call["eos_token_id"],
            return_acc_lengths=True,
            temperature=0.0,
        )
        expected = golden[call["sequence"]]
        assert torch.equal(ids, expected[:, : ids.shape[1]])  # the reference writes on past the end
        assert ids.shape[1] - golden[call["prompt"]].shape[1] == lengths.sum()
        assert lengths[0, 0] == 1
        borders = 256 - golden[call["prompt"]].shape[1] % 256
        if ids.shape[1] // 256 == golden[call["prompt"]].shape[1] // 256 and borders > call["max_new_tokens"] + 8:
            # It also cuts its candidates short before a window border; away from one the forwards agree.
            assert lengths[0, 1:-1].tolist() == golden[call["acc_lengths"]][: lengths.shape[1] - 2].tolist()


paths = st.integers(0, 10_000).map(
    lambda seed: TreeShape.from_paths(_random_paths(torch.Generator().manual_seed(seed))).paths
)


def _random_paths(generator):
    known = [()]
    for _ in range(int(torch.randint(0, 12, (), generator=generator))):
        parent = known[int(torch.randint(len(known), (), generator=generator))]
        path = (*parent, int(torch.randint(4, (), generator=generator)))
        if path not in known and len(path) <= 3:
            known.append(path)
    return known[1:]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    count=st.integers(1, 40),
    tree=st.one_of(st.sampled_from(["chain", "tree31", "tree95", "dynamic", "lookup", "dynamic+lookup", None]), paths),
    sizes=st.sampled_from([(16, 4), (6, 3), (4, 2)]),
    eos=st.lists(st.integers(64, 319), max_size=60),
)
def test_greedy_equals_generate(lengths, count, tree, sizes, eos):
    model = tiny_model(*sizes)
    ids, mask = pad_left([random_ids(n, seed=row) for row, n in enumerate(lengths)])
    how = {"attention_mask": mask, "max_new_tokens": count, "do_sample": False, "eos_token_id": eos or None}
    draft = {"draft": tree} if isinstance(tree, str) or tree is None else {"medusa_choices": tree}
    assert torch.equal(model.multi_byte_generate(ids, **draft, **how), model.generate(ids, **how))


@settings(max_examples=40)
@given(
    length=st.integers(1, 30),
    count=st.integers(1, 30),
    seed=st.integers(0, 1000),
    tree=st.sampled_from(["chain", "tree31", "dynamic", "dynamic+lookup"]),
    warpers=st.sampled_from(
        [
            {},
            {"temperature": 0.7, "top_p": 0.9},
            {"top_k": 5, "repetition_penalty": 1.3},
            {"min_p": 0.05, "no_repeat_ngram_size": 2},
        ]
    ),
)
def test_sampling_draws_the_same_bytes(length, count, seed, tree, warpers):
    """Batch 1, same seed: the same draws from the same distributions."""
    model, ids = tiny_model(), random_ids(1, length, seed=seed)
    how = {"max_new_tokens": count, "do_sample": True, "eos_token_id": None, **warpers}
    torch.manual_seed(seed)
    expected = model.generate(ids, **how)
    torch.manual_seed(seed)
    assert torch.equal(model.multi_byte_generate(ids, draft=tree, **how), expected)


def test_sampled_bytes_have_the_models_distribution():
    """Chi-square of the second and third byte of 3,000 rows against the exact distribution, drafts at work."""
    model, prompt = tiny_model(), random_ids(1, 15)
    top = {"do_sample": True, "top_k": 3, "temperature": 1.5, "eos_token_id": None}
    torch.manual_seed(0)
    rows = model.multi_byte_generate(prompt, max_new_tokens=3, num_return_sequences=3000, draft="tree31", **top)

    def distribution(ids):
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0, -1] / 1.5
        best = logits.topk(3)
        return dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))

    expected = {}
    for first, p in distribution(prompt[0]).items():
        ids = torch.cat((prompt[0], torch.tensor([first])))
        for second, q in distribution(ids).items():
            for third, r in distribution(torch.cat((ids, torch.tensor([second])))).items():
                expected[(first, second, third)] = p * q * r
    counts = dict.fromkeys(expected, 0)
    for row in rows[:, 15:].tolist():
        counts[tuple(row)] += 1  # a KeyError would be a byte outside the top 3
    statistic = sum((counts[key] - 3000 * p) ** 2 / (3000 * p) for key, p in expected.items())
    assert statistic < 54.05  # 99.9 % quantile of chi-square with 26 degrees of freedom


class StopAtLength(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= self.length] * input_ids.shape[0])


def test_stops_exactly():
    model, ids = tiny_model(), random_ids(1, 12)
    free = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None)
    for count in range(1, 12):
        how = {"do_sample": False, "eos_token_id": None}
        assert torch.equal(model.multi_byte_generate(ids, max_new_tokens=count, **how), free[:, : 12 + count])
        stopped = model.multi_byte_generate(
            ids, max_new_tokens=30, stopping_criteria=[StopAtLength(12 + count)], draft="tree31", **how
        )
        assert torch.equal(stopped, free[:, : 12 + count])


def test_scores_and_cache_are_those_of_generate():
    model, ids = tiny_model(), random_ids(1, 12)
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "repetition_penalty": 1.2}
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = model.generate(ids, **how, **wanted)
    output = model.multi_byte_generate(ids, **how, **wanted)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert output.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    more = torch.cat((output.sequences, random_ids(1, 5)), dim=1)
    continued = model.multi_byte_generate(more, past_key_values=output.past_key_values, **how)
    assert torch.equal(continued, model.generate(more, **how))


class CollectIds(TextStreamer):
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streaming():
    model, ids = tiny_model(), random_ids(1, 12)
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    streamer = CollectIds()
    output = model.generate(ids, custom_generate=multibyte_decoding, streamer=streamer, **how)
    assert streamer.ids == output[0].tolist() and streamer.ended
    with pytest.raises(ValueError, match="streamer"):
        model.multi_byte_generate(random_ids(2, 5), streamer=streamer, **how)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"medusa_choices": [(0, 0)]}, "prefix"),
        ({"medusa_choices": [(0,), (0,)]}, "twice"),
        ({"medusa_choices": [(-1,)]}, "ranks"),
        ({"medusa_choices": [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]}, "4 prediction heads"),
        ({"medusa_choices": [(400,)]}, "rank 400"),
        ({"draft": "oak"}, "draft"),
        ({"draft": "chain", "medusa_choices": [(0,)]}, "not both"),
        ({"num_beams": 3}, "beam"),
        ({"use_cache": False}, "use_cache"),
        ({"drafft": "chain"}, "drafft"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().multi_byte_generate(random_ids(1, 5), max_new_tokens=5, **arguments)


def test_one_head_decodes_byte_by_byte():
    model, ids = tiny_model(num_pred_heads=1), random_ids(2, 12)
    how = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    output, lengths = model.multi_byte_generate(ids, return_acc_lengths=True, **how)
    assert torch.equal(output, model.generate(ids, **how))
    assert torch.equal(lengths, torch.ones(2, 9, dtype=torch.int64))


def test_prompt_as_embeddings():
    model, ids = tiny_model(), random_ids(2, 21)
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(
        model.multi_byte_generate(inputs_embeds=embeddings, **how), model.generate(inputs_embeds=embeddings, **how)
    )


def test_stop_strings():
    model, tokenizer, ids = tiny_model(), EvaByteTokenizer(), random_ids(2, 12)
    # With an end id `generate` pads a row that has ended; without one it goes on writing to it, and we do not.
    how = {"do_sample": False, "eos_token_id": 2, "max_new_tokens": 60, "tokenizer": tokenizer}
    allowed = list(range(64 + 97, 64 + 123))  # letters, so that the text is text
    how["prefix_allowed_tokens_fn"] = lambda row, ids: allowed
    free = model.generate(ids, **how)
    for length in (1, 2, 3):
        stops = [tokenizer.decode(row[20 : 20 + length]) for row in free]
        expected = model.generate(ids, stop_strings=stops, **how)
        assert expected.shape[1] < free.shape[1]
        assert torch.equal(model.multi_byte_generate(ids, stop_strings=stops, **how), expected)


def test_processors_know_which_row_they_see():
    """Rows advance at different speed, and finished ones leave; a row's own rule stays its own."""
    golden = load_golden("multibyte_w256_c8")
    model = golden.model()
    ids, mask = pad_left([golden["in.p100.prompt"][0], golden["in.p3.prompt"][0], golden["in.r30.prompt"][0]])
    allowed = [list(range(64, 64 + 110)), list(range(64, 320)), list(range(64 + 32, 64 + 128))]
    how = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 50, "eos_token_id": [64 + ord("w")]}
    how["prefix_allowed_tokens_fn"] = lambda row, ids: allowed[row]
    assert torch.equal(model.multi_byte_generate(ids, **how), model.generate(ids, **how))


def test_several_sequences_for_a_prompt():
    model, ids = tiny_model(), random_ids(2, 10)
    output = model.multi_byte_generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=9, eos_token_id=None)
    assert output.shape == (6, 19)
    assert torch.equal(output[:, :10], ids.repeat_interleave(3, dim=0))


def test_no_time_left():
    output = tiny_model().multi_byte_generate(random_ids(1, 10), max_new_tokens=50, max_time=0.0, eos_token_id=None)
    assert output.shape == (1, 11)  # as in `generate`, time is looked at after each byte


@pytest.mark.parametrize("prefill_chunk_size", [1, 7, 40])
def test_prefill_in_chunks(prefill_chunk_size):
    model = tiny_model()
    ids, mask = pad_left([random_ids(37), random_ids(20, seed=1)])
    how = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.multi_byte_generate(ids, prefill_chunk_size=prefill_chunk_size, **how), model.generate(ids, **how)
    )


def test_all_processes_go_on_until_the_last_is_done(monkeypatch):
    """With `synced_gpus` a process that is done goes on taking part in forwards, and its text stays as it is."""
    model, ids = tiny_model(), random_ids(1, 10)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **how)
    rounds = iter([True] * 12 + [False])
    monkeypatch.setattr(model, "_has_unfinished_sequences", lambda *args, **kwargs: next(rounds))
    assert torch.equal(model.multi_byte_generate(ids, synced_gpus=True, **how), expected)
    assert next(rounds, None) is None


def test_guidance_is_refused_by_name():
    with pytest.raises(ValueError, match="guidance_scale"):
        tiny_model().multi_byte_generate(random_ids(1, 5), guidance_scale=2.0, max_new_tokens=3)
