"""Drafters: what they propose, and that whatever they propose, the bytes are the model's."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from goldens_io import load_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import pad_left, random_ids, tiny_model

from evabyte.byte_tree import ABSENT, ROOT, DraftTrees, TreeShape
from evabyte.drafters import DraftContext, DynamicDrafter, LookupDrafter, UnionDrafter, make_drafter


def context(head_logits, texts=None, temperature=1.0):
    batch = head_logits.shape[0]
    texts = texts or [[70]] * batch
    root = torch.tensor([text[-1] for text in texts])
    return DraftContext(root, head_logits, texts, list(range(batch)), temperature)


def paths_of(trees, row):
    """The bytes from the root to every node, as a set of tuples."""
    parents = trees.parents[row if trees.parents.shape[0] > 1 else 0].tolist()
    ids, paths = trees.ids[row].tolist(), {0: ()}
    for node, parent in enumerate(parents[1:], start=1):
        if parent != ABSENT:
            assert parent < node
            paths[node] = (*paths[parent], ids[node])
    assert len(set(paths.values())) == len(paths)  # no two siblings carry the same byte
    return set(paths.values()) - {()}


@given(
    nodes=st.integers(1, 20),
    heads=st.integers(1, 4),
    vocab=st.integers(2, 9),
    seed=st.integers(0, 999),
    temperature=st.sampled_from([1.0, 0.5]),
)
def test_dynamic_tree_has_the_most_probable_nodes(nodes, heads, vocab, seed, temperature):
    """Against all paths there are, enumerated and sorted."""
    logits = 2 * torch.randn(2, heads, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    nodes = min(nodes, vocab)
    trees = DynamicDrafter(nodes).draft(context(logits, temperature=temperature))
    probs = (logits / temperature).softmax(-1)
    for row in range(2):
        every = {
            path: torch.stack([probs[row, depth, byte] for depth, byte in enumerate(path)]).prod().item()
            for length in range(1, heads + 1)
            for path in product(range(vocab), repeat=length)
        }
        best = sorted(every.values(), reverse=True)[:nodes]
        assert sorted((every[path] for path in paths_of(trees, row)), reverse=True) == pytest.approx(best)


def test_dynamic_tree_with_equal_probabilities_is_a_tree():
    trees = DynamicDrafter(12).draft(context(torch.zeros(3, 4, 320)))
    assert all(len(paths_of(trees, row)) == 12 for row in range(3))


@given(text=st.text("ab", min_size=1, max_size=60), length=st.integers(1, 8), cut=st.integers(0, 60))
def test_lookup_finds_the_longest_suffix(text, length, cut):
    text, suffixes = [ord(c) for c in text], (6, 4, 3, 2)
    drafter = LookupDrafter(length=length, suffixes=suffixes)
    drafter.continuation(0, text[:cut] or text[:1])  # what it read before must not matter
    found = drafter.continuation(0, text)
    for size in suffixes:
        places = [end for end in range(size, len(text)) if text[end - size : end] == text[-size:]]
        if size <= len(text) and places:
            assert found == text[places[-1] : places[-1] + length]
            return
    assert found == []


def test_union_adds_only_what_is_new():
    heads = torch.full((2, 3, 320), -9.0)
    for depth, byte in enumerate((80, 81, 82)):
        heads[:, depth, byte] = 9.0
    texts = [[80, 81, 99, 70, 5, 70, 80, 81, 99, 70], [70]]  # the first was seen going on with 5; the second is new
    drafter = UnionDrafter(DynamicDrafter(3), LookupDrafter(length=4, suffixes=(3, 1)))
    trees = drafter.draft(context(heads, texts))
    assert paths_of(trees, 0) == {(80,), (80, 81), (80, 81, 82), (5,), (5, 70), (5, 70, 80), (5, 70, 80, 81)}
    assert paths_of(trees, 1) == {(80,), (80, 81), (80, 81, 82)}
    texts[0][4] = 80  # now lookup goes the same way for one byte
    drafter = UnionDrafter(DynamicDrafter(3), LookupDrafter(length=4, suffixes=(3, 1)))
    assert paths_of(drafter.draft(context(heads, texts)), 0) == {
        (80,),
        (80, 81),
        (80, 81, 82),
        (80, 70),
        (80, 70, 80),
        (80, 70, 80, 81),
    }
    sources = drafter.draft(context(heads, texts)).sources[0].tolist()
    assert sources[:4] == [0] * 4 and set(sources[4:]) == {1}


@given(seed=st.integers(0, 999), nodes=st.integers(1, 30))
def test_mask_marks_the_ancestors(seed, nodes):
    generator = torch.Generator().manual_seed(seed)
    parents = [ROOT] + [int(torch.randint(-1, n, (), generator=generator)) for n in range(1, nodes)]
    parents = [parent if node == 0 or parent >= 0 else ABSENT for node, parent in enumerate(parents)]
    trees = DraftTrees(torch.zeros(1, nodes, dtype=torch.int64), torch.tensor([parents]), nodes)
    for node in range(nodes):
        ancestors, at = set(), node
        while at >= 0:
            ancestors.add(at)
            at = parents[at]
        assert set(trees.mask[0, node].nonzero().flatten().tolist()) == ancestors


@dataclass
class RandomDrafter:
    """Trees of random shapes and bytes, another one for every row and step: mostly wrong, sometimes right."""

    candidates: list[int]
    nodes: int = 9

    def draft(self, context):
        batch = len(context.rows)
        parents = torch.stack(
            [torch.tensor([ROOT, *(int(torch.randint(n, ())) for n in range(1, self.nodes))]) for _ in range(batch)]
        )
        choice = torch.tensor(self.candidates)[torch.randint(len(self.candidates), (batch, self.nodes))]
        choice[:, 0] = context.root
        return DraftTrees(choice, parents, self.nodes)


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_a_drafter_of_ones_own(lengths, seed):
    """Siblings may carry the same byte here, and trees are as deep as they like, window borders notwithstanding."""
    model = tiny_model(6, 3)
    ids, mask = pad_left([random_ids(n, seed=row) for row, n in enumerate(lengths)])
    how = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **how)
    torch.manual_seed(seed)
    drafter = RandomDrafter(expected[:, ids.shape[1] :].unique().tolist())
    output, forwards = model.multi_byte_generate(ids, draft=drafter, return_acc_lengths=True, **how)
    assert torch.equal(output, expected)
    assert (forwards.sum(-1) == 20).all()


@pytest.mark.parametrize("draft", ["chain", "tree31", "tree95", "dynamic", "lookup", "dynamic+lookup"])
def test_a_model_that_predicts_well(draft):
    """The trained golden model accepts long drafts; prompts left-padded, greedy and sampled bytes those of generate."""
    golden = load_golden("multibyte_w256_c8")
    model = golden.model()
    rows = [golden["in.p240.prompt"][0], golden["in.p3.prompt"][0], golden["in.p100.prompt"][0]]
    ids, mask = pad_left(rows)
    how = {"max_new_tokens": 60, "eos_token_id": None}
    greedy = model.generate(ids, attention_mask=mask, do_sample=False, **how)
    output, forwards = model.multi_byte_generate(
        ids, attention_mask=mask, do_sample=False, draft=draft, return_acc_lengths=True, **how
    )
    assert torch.equal(output, greedy)
    if draft != "lookup":
        assert forwards.shape[1] < 30
    for row in rows:
        torch.manual_seed(1)
        expected = model.generate(row[None], do_sample=True, temperature=0.8, top_p=0.9, **how)
        torch.manual_seed(1)
        assert torch.equal(
            model.multi_byte_generate(row[None], do_sample=True, temperature=0.8, top_p=0.9, draft=draft, **how),
            expected,
        )


def test_the_trace_tells_where_bytes_came_from():
    golden = load_golden("multibyte_w256_c8")
    model, prompt = golden.model(), golden["in.p100.prompt"]
    output = model.multi_byte_generate(
        prompt,
        max_new_tokens=50,
        do_sample=False,
        eos_token_id=None,
        draft="dynamic+lookup",
        draft_nodes=5,
        return_dict_in_generate=True,
        return_trace=True,
    )
    (steps,) = output.trace
    assert [byte for step in steps for byte in step.bytes] == output.sequences[0, 100:].tolist()
    assert [len(step.bytes) for step in steps] == output.acc_lengths[0].tolist()
    assert all(len(step.sources) == len(step.bytes) - 1 for step in steps)
    assert {source for step in steps for source in step.sources} == {0, 1}
    assert all(step.drafted >= 5 for step in steps[1:])


def test_finished_rows_leave_and_neighbours_do_not_matter():
    model = tiny_model()
    rows = [random_ids(n, seed=n) for n in (5, 9, 12, 20)]
    ids, mask = pad_left(rows)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None)
    eos = free[:3, ids.shape[1] + 3].unique().tolist()  # three rows end early
    how = {"do_sample": False, "eos_token_id": eos, "max_new_tokens": 40}
    together = model.multi_byte_generate(ids, attention_mask=mask, **how)
    for row, alone in enumerate(rows):
        expected = model.multi_byte_generate(alone[None], **how)[0, len(alone) :]
        written = together[row, ids.shape[1] :]
        assert torch.equal(written[: len(expected)], expected)
        assert (written[len(expected) :] == 0).all()


def test_typical_acceptance_is_longer_and_lossy():
    golden = load_golden("multibyte_w256_c8")
    model, prompt = golden.model(), golden["in.p100.prompt"]
    how = {"max_new_tokens": 200, "eos_token_id": None, "temperature": 1.0, "return_acc_lengths": True}
    torch.manual_seed(0)
    _, typical = model.multi_byte_generate(
        prompt, sampling="typical", posterior_threshold=0.01, posterior_alpha=0.05, draft="tree31", **how
    )
    torch.manual_seed(0)
    _, exact = model.multi_byte_generate(prompt, sampling="nucleus", top_p=1.0, draft="tree31", **how)
    assert typical.shape[1] < exact.shape[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "bush"}, "bush"),
        ({"name": "dynamic+oak"}, "dynamic\\+lookup"),
        ({"name": "chain", "nodes": 4}, "draft_nodes"),
        ({"name": "dynamic", "nodes": 0}, "at least 1"),
    ],
)
def test_bad_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_drafter(max_depth=7, device=torch.device("cpu"), batch=1, **arguments)


def test_bad_drafter():
    with pytest.raises(ValueError, match="draft"):
        tiny_model().multi_byte_generate(random_ids(1, 4), draft=7, max_new_tokens=3)
    assert TreeShape.chain(0).nodes == 1


def test_typical_acceptance_needs_all_nodes_at_once():
    with pytest.raises(ValueError, match="RepetitionPenaltyLogitsProcessor"):
        tiny_model().multi_byte_generate(
            random_ids(1, 4), sampling="typical", repetition_penalty=1.2, temperature=1.0, max_new_tokens=3
        )
