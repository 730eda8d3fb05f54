"""The indices against sorted lists of plain products; the graph's edges, and what it is for."""

import importlib.util
import itertools
import math
from random import randrange

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.errors import InputError, UnsupportedError
from saccade.kernels.search import KINDS, Indices, api, index
from saccade.kernels.search.graph import Graph, _partners, _pruned, _reachable
from saccade.kernels.search.lists import _clustered

faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed (saccade[search])")
EVERY = [pytest.param(kind, marks=[faiss] if kind.startswith("faiss") else []) for kind in KINDS]
# so much sight that nothing is missed
WIDE = {
    "graph": {"queue": 10_000},
    "lists": {"probes": 10_000, "stretch": 40, "each": 6},
    "faiss-ivf": {"probes": 10_000},
    "faiss-hnsw": {"queue": 10_000},
}


def drawn(n, D=8, m=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g), torch.randn(m, D, generator=g)


def by_hand(keys, query, count):
    products = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
    return sorted(range(len(keys)), key=lambda j: -products[j])[:count]


@pytest.mark.parametrize("kind", [k for k in EVERY if (k.values[0] != "faiss-nsg")])
@pytest.mark.parametrize("n", [1, 2, 9, 150])
def test_with_sight_enough_it_is_exact(kind, n):
    keys, queries = drawn(n)
    made = index(kind, **WIDE.get(kind, {}))
    made.build(keys, queries[:10])
    found = made.search(queries, 7)
    assert found.ids.shape == (20, 7) and found.ids.dtype == torch.int64
    for q, ids in zip(queries.tolist(), found.ids.tolist(), strict=True):
        want = by_hand(keys.tolist(), q, 7)
        assert ids == want + [-1] * (7 - len(want))
    # centroids are scanned, too, and faiss counts a key again on each floor of a hierarchy (and none for a single key)
    most = {"faiss-ivf": n + round(4 * n**0.5), "faiss-hnsw": 2 * n, "lists": n + n // 6 + 1}.get(kind, n)
    assert (kind == "faiss-hnsw" and n == 1) or 0 < found.scanned <= most
    assert made.bytes() >= keys.numel() * 4
    assert made.search(queries[:0], 3).ids.shape == (0, 3)


@pytest.mark.parametrize("kind", EVERY)
def test_it_finds_most(kind):
    keys, queries = drawn(2000, 16, 400)
    made = index(kind)
    made.build(keys, queries[:300])
    exact = (queries[300:] @ keys.T).topk(10).indices
    found = made.search(queries[300:], 10).ids
    assert bool((found < 2000).all()) and bool((found >= -1).all())
    recall = (found[:, :, None] == exact[:, None]).any(1).float().mean()
    assert recall > (0.5 if kind in ("faiss-ivf", "lists") else 0.85)
    # best first, none twice
    scores = (queries[300:, None] @ keys[found].transpose(1, 2)).squeeze(1)
    assert bool((scores[:, 1:] <= scores[:, :-1] + 1e-5).all())
    assert all(len(set(row)) == 10 for row in found.tolist())


@given(
    n=st.integers(1, 90),
    degree=st.integers(1, 9),
    near=st.integers(0, 5),
    m=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_the_graphs_edges(n, degree, near, m, seed):
    keys, queries = drawn(n, 4, m, seed)
    graph = Graph(degree=degree, near=near, lists=12, entries=3)
    graph.build(keys, queries)
    edges = graph.edges.tolist()
    for key, row in enumerate(edges):
        real = [j for j in row if j >= 0]
        assert key not in real and len(set(real)) == len(real) and all(j < n for j in real)
    seen, front = set(graph.starts.tolist()), graph.starts.tolist()
    while front:
        front = list({j for key in front for j in edges[key] if j >= 0} - seen)
        seen |= set(front)
    assert seen == set(range(n)), "a key cannot be reached"


def test_keys_of_the_same_lists_become_neighbours():
    # 0, 1, 2 stand together twice, 2 and 3 once, 4 alone
    lists = torch.tensor([[0, 1, 2], [2, 1, 0], [2, 3, 3], [4, -1, -1]])
    edges = _partners(lists, 6, 2)
    want = [{1, 2}, {0, 2}, {0, 1}, {2}, set(), set()]
    assert [{j for j in row if j >= 0} for row in edges.tolist()] == want


def test_pruning_by_occlusion():
    keys = torch.tensor([[2.0, 0.0], [1.9, 0.1], [1.8, 0.0], [0.0, 1.0]])
    ids = torch.tensor([[1, 2, 3]])
    scores = torch.tensor([[3.8, 3.6, -1.0]])
    # by hand: 1 is taken; 2 is nearer to the key (3.6) than to 1 (3.42), so taken; 3 is nearer to 1 (0.1) than -1
    assert _pruned(keys, ids, scores, 2).tolist() == [[1, 2]]
    hub = torch.tensor([[1.0, 0.0], [5.0, 0.0], [2.0, 0.0], [0.5, 3.0]])
    scores = torch.tensor([[5.0, 2.0, 0.5]])
    # 1 is nearer to 2 and 3 than the key is: both are left out, then 2 fills the place
    assert _pruned(hub, ids, scores, 2).tolist() == [[1, 2]]
    assert _pruned(
        torch.cat((hub[:3], torch.tensor([[-0.5, 3.0]]))), ids, torch.tensor([[5.0, 2.0, -0.5]]), 2
    ).tolist() == [[1, 3]]


def test_what_is_cut_off_is_joined():
    keys = drawn(50, 4)[0]
    edges = torch.full((50, 1), -1)
    joined = _reachable(keys, edges, torch.tensor([7]))
    seen, front = {7}, [7]
    while front:
        front = list({j for key in front for j in joined[key].tolist() if j >= 0} - seen)
        seen |= set(front)
    assert len(seen) == 50 and int((joined >= 0).sum(1).max()) <= 8


def far_head(n, D=32, few=5, m=1200, seed=0):
    """Keys, and queries that look at a few channels which make up little of what keys differ in; and such like keys."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.cat((torch.full((few,), 1.0), torch.full((D - few,), 3.0)))
    far = torch.cat((torch.full((few,), 16.0), torch.full((D - few,), 0.3)))
    keys, queries, like = (torch.randn(k, D, generator=g) * s for k, s in ((n, spread), (m, far), (m, spread)))
    return keys, queries, like


def scanned_for(made, keys, queries, recall=0.95, top=50):
    """Keys scanned, as a share, until so much of the attention mass of the best keys is found."""
    probs = (queries @ keys.T / math.sqrt(keys.shape[1])).softmax(-1)
    best = probs.topk(top).indices
    for queue in (50, 75, 100, 150, 200, 300, 400, 600, 900, 1400, 2000, 3000):
        made.queue = queue
        found = made.search(queries, top)
        hit = (found.ids[:, :, None] == best[:, None]).any(-1)
        got = (probs.gather(1, found.ids.clamp_min(0)) * hit).sum(-1) / probs.gather(1, best).sum(-1)
        if got.mean() >= recall:
            return found.scanned / len(keys)
    return 1.0


def test_queries_far_from_keys_need_a_graph_that_knows_them():
    """RetrievalAttention's effect, and its control: where queries are like keys, knowing them wins nothing."""
    keys, far, like = far_head(3000)
    shares = {}
    for name, queries in (("far", far), ("like", like)):
        for taught in (True, False):
            graph = Graph(lists=50)
            graph.build(keys, queries[:1150] if taught else None)
            shares[name, taught] = scanned_for(graph, keys, queries[1150:])
    assert shares["far", True] < shares["far", False] / 3
    assert shares["like", True] > shares["like", False] / 1.5


@faiss
def test_faiss_scans_more_where_queries_are_far():
    keys, far, _ = far_head(3000)
    graph, hnsw = Graph(lists=50), index("faiss-hnsw")
    graph.build(keys, far[:1150])
    hnsw.build(keys)
    assert scanned_for(graph, keys, far[1150:]) < scanned_for(hnsw, keys, far[1150:]) / 3


def test_rows_and_heads_have_an_index_each_and_rows_are_picked():
    keys, queries = torch.randn(2, 3, 40, 8), torch.randn(2, 6, 5, 8)
    made = Indices("graph", keys, torch.randn(2, 6, 30, 8), {"queue": 100})
    made.wait()
    keys_then = keys.clone()
    keys.zero_()  # it made its copy
    want = (queries.unflatten(1, (3, 2)) @ keys_then[:, :, None].transpose(-1, -2)).flatten(1, 2).topk(4).indices
    ids, scanned = made.search(queries, 4)
    assert torch.equal(ids, want) and 0 < scanned <= 2 * 6 * 5 * 40
    picked = made.select(torch.tensor([1, 1, 0]))
    assert torch.equal(picked.search(queries[[1, 1, 0]], 4)[0], want[[1, 1, 0]])
    assert picked.bytes() == made.bytes() > keys.numel() * 4


def test_bad_input(monkeypatch):
    with pytest.raises(InputError, match="unknown kind of index 'hsnw', did you mean"):
        index("hsnw")
    with pytest.raises(InputError, match="does not take these arguments"):
        index("flat", queue=3)
    with pytest.raises(InputError, match="degree must be an int >= 1, got 0"):
        Graph(degree=0)
    for kind in ("flat", "graph", "lists"):
        made = index(kind)
        with pytest.raises(InputError, match="build"):
            made.search(torch.zeros(1, 4), 3)
        with pytest.raises(InputError, match="none empty"):
            made.build(torch.zeros(0, 4))
        with pytest.raises(InputError, match="NaN"):
            made.build(torch.full((3, 4), float("nan")))
        made.build(torch.randn(5, 4), torch.randn(2, 4))
        with pytest.raises(InputError, match=r"\[m, 4\]"):
            made.search(torch.zeros(1, 3), 3)
        with pytest.raises(InputError, match="count"):
            made.search(torch.zeros(1, 4), 0)
    with pytest.raises(InputError, match="queries must be"):
        Graph().build(torch.randn(5, 4), torch.randn(2, 3))
    monkeypatch.setattr(api.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"saccade\[search\]"):
        index("faiss-hnsw")


def test_lists_hold_every_key_once_and_scan_the_clusters_that_answer_best():
    keys, queries = drawn(700, 8, 30)
    lists = index("lists", each=10, probes=3, stretch=150, rounds=4)
    lists.build(keys)
    assert sorted(lists.ids.tolist()) == list(range(700)) and torch.equal(lists.keys, keys[lists.ids.long()])
    bounds = lists.starts.tolist()
    *clusters, wanted = [lists.ids[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    assert all(clusters) and wanted == [] and bounds[-1] == 700
    for ids, mean in zip(clusters, lists.centroids, strict=True):
        # of one stretch, and nearer to their own centroid than to any other of it
        assert len({i // 150 for i in ids}) == 1
        others = [c for c, those in zip(lists.centroids, clusters, strict=True) if those[0] // 150 == ids[0] // 150]
        for i in ids:
            assert (keys[i] - mean).norm() <= min((keys[i] - c).norm() for c in others) + 1e-5
    found = lists.search(queries, 12)
    for q, got in zip(queries, found.ids.tolist(), strict=True):
        best = sorted(range(len(clusters)), key=lambda c: -float(q @ lists.centroids[c]))[:3]
        seen = [i for c in best for i in clusters[c]]
        want = sorted(seen, key=lambda i: -float(q @ keys[i]))[:12]
        assert got == want + [-1] * (12 - len(want))
    alone = [lists.search(q[None], 12).ids[0] for q in queries]
    assert torch.equal(torch.stack(alone), found.ids)  # whoever asks beside it


def test_lists_find_neighbours_in_the_text():
    """The case that they are for: keys of a stretch of text are alike, and queries look for stretches."""
    g = torch.Generator().manual_seed(3)
    topics = torch.randn(40, 32, generator=g)
    keys = topics.repeat_interleave(50, 0) + 0.5 * torch.randn(2000, 32, generator=g)
    queries = topics[torch.randperm(40, generator=g)] + 0.3 * torch.randn(40, 32, generator=g)
    lists = index("lists", each=16, probes=8, stretch=512)
    lists.build(keys)
    found = lists.search(queries, 30)
    exact = (queries @ keys.T).topk(30).indices
    recall = (found.ids[:, :, None] == exact[:, None]).any(1).float().mean()
    assert recall > 0.9 and found.scanned < 0.2 * 2000


def test_single_keys_that_every_query_wants_are_a_list_of_their_own():
    """A few heavy keys among many do not move the centroids of their clusters; without them recall is poor."""
    g = torch.Generator().manual_seed(4)
    keys, heavy = torch.randn(3000, 32, generator=g), torch.randn(32, generator=g)
    at = torch.randperm(3000, generator=g)[:20]
    keys[at] += heavy
    queries = heavy + 0.3 * torch.randn(80, 32, generator=g)
    recall = {}
    for taught in (True, False):
        lists = index("lists", each=50, probes=3, stretch=1000, wanted=40)
        lists.build(keys, queries[:60] if taught else None)
        found = lists.search(queries[60:], 20).ids
        exact = (queries[60:] @ keys.T).topk(20).indices
        recall[taught] = float((found[:, :, None] == exact[:, None]).any(1).float().mean())
        assert sorted(lists.ids.tolist()) == list(range(3000))
        assert int(lists.starts[-1] - lists.starts[-2]) == (40 if taught else 0)
    assert recall[True] > 0.8 and recall[False] < 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clusters_are_those_of_k_means_by_hand(dtype):
    drift, noise = drawn(203, D=7, m=203)
    keys, each, rounds = (drift.cumsum(0) / 4 + noise).to(dtype), 9, 3
    # a key far from all others, and two alike: one of them leaves its cluster empty
    keys[40], keys[0] = 9.0, keys[10]
    means = keys[torch.linspace(0, 202, 203 // each).round().long()].double()

    def owners():
        return [int(((key - means) ** 2).sum(-1).argmin()) for key in keys.double()]

    for _ in range(rounds):
        owner = torch.tensor(owners())
        for c in owner.unique().tolist():
            means[c] = keys[owner == c].double().mean(0)
    names = sorted(set(owners()))
    mine, centroids = _clustered(keys, each, rounds)
    assert mine.tolist() == [names.index(c) for c in owners()]
    torch.testing.assert_close(centroids.double(), means[names], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_none_is_told_wherever_it_stands(bad):
    keys = torch.randn(50, 8)
    keys[randrange(50), randrange(8)] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        index("lists").build(keys)
