"""Verification of drafts: LANTERN's recorded draws, and distributions by exact enumeration over small vocabularies."""

from itertools import product

import pytest
import torch

from samplers.lantern import Lantern, Relaxed, neighbours
from samplers.logits import Sampling, keep_top_k, keep_top_p
from samplers.rules import Grouped, KSeq, Lossless
from samplers.settings import make
from samplers.speculative import Speculative, verify, verify_greedy
from samplers.trees import Drafted, DrawnTree, DynamicTree, Tree, tree_of, without_replacement


@pytest.fixture
def case(golden):
    return golden("lantern/accept")


def official_rule(settings: dict, io: dict):
    if not settings["lantern"]:
        return Lossless()
    value = settings["lantern_delta"]
    bound = {"lambda_": value} if value > 1 else {"delta": value}
    return Relaxed(io["neighbours"], settings["lantern_k"], official=True, **bound)


def processed(logits: torch.Tensor, io: dict, trial: int) -> torch.Tensor:
    """Probabilities as the authors make them: temperature, top-p, then top-k."""
    scaled = keep_top_p(logits / io["temperature"][trial], float(io["top_p"][trial]))
    return keep_top_k(scaled, int(io["top_k"][trial])).softmax(dim=-1)


def test_a_tree_knows_its_parents_and_masks(case):
    io, tree = case.io, Tree.of_paths(case.config["tree_choices"])
    assert list(tree.parents) == io["parent"].tolist()
    assert [node for node, children in enumerate(tree.children) if children] == io["expanded_nodes"].tolist()
    assert tree.depths.tolist() == [0] + sorted(len(path) for path in case.config["tree_choices"])
    assert tree.mask.sum(dim=1).tolist() == (tree.depths + 1).tolist()


@pytest.mark.parametrize("kind", ["greedy", "sample_topk", "sample_tree", "sample_tree_target_rule"])
def test_the_authors_decisions(case, kind):
    io, tree = case.io, Tree.of_paths(case.config["tree_choices"])
    expanded = io["expanded_nodes"].tolist()
    for mode, settings in case.config["modes"].items():
        if (kind, mode) == ("sample_tree_target_rule", "lossless"):  # the two rules are one there
            continue
        rule = official_rule(settings, io)
        for trial in range(case.config["trials"]):
            tokens = io["tree_tokens_topk" if kind in ("greedy", "sample_topk") else "tree_tokens_sampled"][
                trial
            ].tolist()
            expected = {name: io[f"{kind}/{mode}/{name}"][trial] for name in ("best_path", "accept_length", "next")}
            path = io["retrieve_indices"][expected["best_path"]][: expected["accept_length"] + 1].tolist()
            if kind == "greedy":
                assert verify_greedy(io["target_logits"][trial].softmax(dim=-1), tree, tokens, rule) == path
                continue
            drafted = None
            if kind != "sample_topk":
                probs = {node: io["draft_probs"][trial, row] for row, node in enumerate(expanded)}
                proposal_probs = [1.0] * len(tree.parents)
                for row, node in enumerate(expanded):
                    for rank, child in enumerate(tree.children[node]):
                        proposal_probs[child] = float(io["sampled_conditional_probs"][trial, row, rank])
                drafted = Drafted(probs, proposal_probs)
            numbers = iter(io["uniforms"][trial].tolist())
            probs = processed(io["target_logits"][trial], io, trial)
            reject_in = "target" if kind.endswith("target_rule") else "draft"
            kept, following, _ = verify(probs, tree, tokens, rule, numbers, drafted, reject_in)
            assert kept == path, (mode, trial)
            torch.testing.assert_close(following, expected["next"], atol=1e-5, rtol=0)
            used = io["uniforms"].shape[1] - len(list(numbers))
            assert used == io[f"{kind}/{mode}/uniforms_used"][trial]


def test_drawing_without_replacement(case):
    io = case.io
    for trial, row in product(range(3), range(11)):
        probs = processed(io["draft_logits"][trial, row], io, trial)
        torch.testing.assert_close(probs, io["draft_probs"][trial, row], atol=1e-6, rtol=0)
        tokens, proposal_probs = without_replacement(probs, io["draft_uniforms"][trial, row].tolist())
        expected = io["sampled_conditional_probs"][trial, row]
        possible = expected > 1e-6  # beyond the last possible token nothing is defined
        assert torch.equal(torch.tensor(tokens)[possible], io["sampled_tokens"][trial, row][possible])
        torch.testing.assert_close(
            torch.tensor(proposal_probs)[possible].float(), expected[possible], atol=1e-5, rtol=1e-4
        )


def outcome(probs, draft, tokens, rule, drawn: bool, independent: bool = False) -> torch.Tensor:
    """Law [K] of the first token that is written when `tokens` are the root's children, by integrating out every number."""
    tree, total = Tree((-1, *[0] * len(tokens))), torch.zeros_like(probs)
    proposal_probs = [1.0]
    left = draft.clone()
    for token in tokens:
        proposal_probs.append(float(left[token] / left.sum()))
        left[token] *= independent
    drafted = Drafted({0: draft}, proposal_probs) if drawn else None
    probs, reached = probs.expand(len(tokens) + 1, -1), 1.0
    for number, token in enumerate(tokens):
        accepted = acceptance(probs, tree, tokens, rule, drafted, number)
        total[token] += reached * accepted
        reached *= 1 - accepted
    if reached > 0:
        _, following, _ = verify(probs, tree, [0, *tokens], rule, iter([torch.inf] * len(tokens)), drafted)
        total += reached * following
    return total


def acceptance(probs, tree, tokens, rule, drafted, number) -> float:
    """Probability that candidate `number` is accepted after the earlier ones were not: by bisection on its number."""
    low, high = 0.0, 1.0

    def accepted(value: float) -> bool:
        kept, *_ = verify(
            probs, tree, [0, *tokens], rule, iter([torch.inf] * number + [value] + [torch.inf] * 9), drafted
        )
        return kept == [0, number + 1]

    if accepted(1.0):
        return 1.0
    if not accepted(0.0):
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if accepted(middle) else (low, middle)
    return low


SAMPLINGS = [Sampling(), Sampling(temperature=0.6), Sampling(temperature=1.5, top_k=3), Sampling(top_p=0.7)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("exact", ["lossless", "k0", "delta0", "lambda1"])
def test_samples_have_the_target_distribution(sampling, exact):
    generator = torch.Generator().manual_seed(0)
    table = neighbours(torch.randn(5, 2, generator=generator), 4)
    rule = {
        "lossless": Lossless(),
        "k0": Relaxed(table, 0, delta=0.5),
        "delta0": Relaxed(table, 3, delta=0.0),
        "lambda1": Relaxed(table, 3, lambda_=1.0),
    }[exact]
    for _ in range(3):
        probs, draft = (sampling.filter(row).double().softmax(-1) for row in 2 * torch.randn(2, 5, generator=generator))
        candidates = draft.topk(2).indices.tolist()
        torch.testing.assert_close(outcome(probs, draft, candidates, rule, drawn=False), probs, atol=1e-9, rtol=0)
        total, pairs = torch.zeros_like(probs), 0.0
        for pair in product(range(5), repeat=2):  # every pair that can be drawn without replacement
            left = 1 - draft[pair[0]]
            proposal_prob = (
                float(draft[pair[0]] * draft[pair[1]] / left) if pair[0] != pair[1] and left > 1e-12 else 0.0
            )
            if proposal_prob:
                total += proposal_prob * outcome(probs, draft, list(pair), rule, drawn=True)
                pairs += proposal_prob
        torch.testing.assert_close(total, pairs * probs, atol=1e-9, rtol=0)


def test_delta_bounds_one_relaxation():
    generator = torch.Generator().manual_seed(1)
    table = neighbours(torch.randn(8, 2, generator=generator), 7)
    for delta in (0.05, 0.2):
        rule = Relaxed(table, 6, delta=delta)
        probs, draft = torch.randn(2, 8, generator=generator).double().softmax(-1)
        moved = outcome(probs, draft, [int(draft.argmax())], rule, drawn=False)
        assert moved.sum().item() == pytest.approx(1)
        assert 0.5 * (moved - probs).abs().sum() <= delta + 1e-9
        assert moved[draft.argmax()] >= probs[draft.argmax()]


def test_neighbours_are_the_nearest_codes():
    codebook = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
    assert neighbours(codebook, 3).tolist() == [[1, 2, 3], [0, 2, 3], [3, 1, 0], [2, 1, 0]]
    with pytest.raises(ValueError, match="k is 4: expected 0 to 3"):
        neighbours(codebook, 4)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"k": 2, "delta": 1.1}, "delta is 1.1: expected 0 to 1"),
        ({"k": 2, "lambda_": 0.5}, "lambda_ is 0.5: expected 1 or more"),
        ({"k": 2}, "expected one bound"),
        ({"k": 2, "delta": 0.1, "lambda_": 2}, "expected one bound"),
        ({"k": 3, "delta": 0.1}, "k is 3: expected 0 to 2"),
    ],
)
def test_bounds_that_make_no_sense(settings, match):
    with pytest.raises(ValueError, match=match):
        Relaxed(torch.zeros(4, 3, dtype=torch.int64), **settings)


def test_a_group_is_of_tokens_about_as_likely():
    probs = torch.tensor([0.30, 0.25, 0.2, 0.15, 0.1, 0.0])
    raised = Grouped(side=1, near=0.06).relax(probs, 2)
    assert sorted(raised.neighbours.tolist()) == [1, 3]
    assert raised.likely == pytest.approx(0.6)
    assert (
        Grouped(side=2, near=0.06).relax(probs, 2).neighbours.tolist() == raised.neighbours.tolist()
    )  # the others are too far
    assert Grouped(side=0).relax(probs, 2).likely == probs[2]
    draft = torch.tensor([0.1, 0.1, 0.5, 0.1, 0.1, 0.1])
    tree, drafted = Tree((-1, 0)), Drafted({0: draft}, [1.0, 0.5])
    for number, kept in ((0.85, [0, 1]), (0.86, [0])):  # 0.6 / (0.5 + 0.1 + 0.1)
        verdict = verify(probs.expand(2, -1), tree, [0, 2], Grouped(1, 0.06), iter([number]), drafted)
        assert verdict.accepted == kept
        assert verdict.relaxed == set(kept[1:])


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_independent_candidates_keep_the_distribution(sampling, count):
    generator = torch.Generator().manual_seed(count)
    for _ in range(2):
        probs, draft = (sampling.filter(row).double().softmax(-1) for row in 2 * torch.randn(2, 4, generator=generator))
        total = torch.zeros_like(probs)
        for drawn in product(range(4), repeat=count):
            proposal_prob = float(draft[list(drawn)].prod())
            if proposal_prob:
                total += proposal_prob * outcome(probs, draft, list(drawn), KSeq(), drawn=True, independent=True)
        torch.testing.assert_close(total, probs, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="drawn independently"):
        verify(probs.expand(2, -1), Tree((-1, 0)), [0, 1], KSeq(), iter([0.5]))


def test_sizes_of_a_tree_are_settings():
    assert make(Speculative, {"nodes": 8}).shape == DynamicTree(8, 3, 4)
    assert make(Lantern, {"tree": "drawn", "nodes": 8, "depth": 2}).nodes == 8
    assert tree_of("dynamic", nodes=8, depth=None, width=2) == DynamicTree(8, 3, 2)
    assert tree_of(DrawnTree(9, 4), depth=2) == DrawnTree(9, 2)
    for tree, sizes in (("independent", {"nodes": 8}), ("drawn", {"width": 3})):
        with pytest.raises(
            ValueError, match=r"^(nodes is 8|width is 3), which the tree [a-z]+ does not have: choose the tree dynamic"
        ):
            make(Speculative, {"tree": tree} | sizes)
