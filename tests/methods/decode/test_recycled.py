"""What is true of Recycled: a full step finds, the steps after it reuse, and the schedule or the query says when."""

import copy
import math

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Full, Tokens, Union, Window
from saccade.kernels.attend import attend
from saccade.methods.apply import apply
from saccade.methods.decode.recycled import Recycled


def drawn(B, H, G, M, D=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, M, D, generator=g, dtype=torch.float64) for heads in (H, G, G)]


def at(tensors, M, n=1, memory=None, **fields):
    """The newest n of M tokens: q, k, v and their call."""
    q, k, v = tensors
    q, k, v = q[:, :, M - n : M], k[:, :, :M], v[:, :, :M]
    return q, k, v, Call.of(q, k, memory={} if memory is None else memory, **fields)


def steps(method, tensors, start, end, memory=None):
    """Patterns and outputs of single steps at lengths start..end."""
    memory, found = {} if memory is None else memory, []
    for M in range(start, end + 1):
        q, k, v, call = at(tensors, M, memory=memory)
        pattern = method.select(q, k, call)
        found.append((pattern, answer(q, k, v, pattern)))
    return found


def answer(q, k, v, pattern):
    """Attention to what a pattern says."""
    return attend(q, k, v, pattern, Call.of(q, k)).o


def paper(queries, k, v, start, K, S, kernel, together):
    """One key head, its query heads [h][t][D] and one row, in plain floats: per step the outputs and the sets read.

    The partial cache is a list with the best first; new tokens stand before all old ones.
    """
    D, heads = len(k[0]), range(len(queries))
    caches, since, outs, sets = {}, None, [], []
    for t in range(start - 1, len(k)):
        probs = {}
        for h in heads:
            scores = [sum(a * b for a, b in zip(queries[h][t], k[j], strict=True)) / math.sqrt(D) for j in range(t + 1)]
            most = max(scores)
            weights = [math.exp(s - most) for s in scores]
            probs[h] = [w / sum(weights) for w in weights]
        full = t + 1 <= K + 1 or since is None or since >= S
        read = {}
        for h in heads:
            if full:
                read[h] = set(range(t + 1))
            else:
                caches[h] = [t, *caches[h]]
                read[h] = set(caches[h])
                caches[h] = caches[h][:K]
        if full and t + 1 > K + 1:
            for h in heads:
                p = [max(probs[g][j] for g in heads) for j in range(t + 1)] if together else probs[h]
                half = kernel // 2
                smooth = [max(p[max(0, j - half) : j + half + 1]) for j in range(t + 1)]
                caches[h] = sorted(range(t + 1), key=lambda j, s=smooth: (-s[j], j))[:K]
            since = 0
        since = None if since is None else since + 1
        out = []
        for h in heads:
            total = sum(probs[h][j] for j in read[h])
            out.append([sum(probs[h][j] * v[j][d] for j in read[h]) / total for d in range(D)])
        outs.append(out)
        sets.append(read)
    return outs, sets


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("start", "K", "S", "kernel"), [(30, 9, 5, 7), (3, 8, 4, 3), (40, 5, 12, 1), (1, 1, 2, 5)])
def test_matches_paper_loop(start, K, S, kernel, together):
    tensors = drawn(2, 4, 2, start + 26, seed=start)
    method = Recycled(budget=K + 1, stride=S, kernel=kernel, together=together)
    found = steps(method, tensors, start, start + 26)
    q, k, v = tensors
    for b in range(2):
        for g in range(2):
            heads = (2 * g, 2 * g + 1)
            queries = [q[b, h].tolist() for h in heads]
            outs, sets = paper(queries, k[b, g].tolist(), v[b, g].tolist(), start, K, S, kernel, together)
            for n, (pattern, o) in enumerate(found):
                call = Call.of(q[:, :, :1], k[:, :, : start + n])
                for i, h in enumerate(heads):
                    assert set(pattern.mask(call)[b, h, 0].nonzero().flatten().tolist()) == sets[n][i]
                    want = torch.tensor(outs[n][i], dtype=torch.float64)
                    torch.testing.assert_close(o[b, h, 0], want, atol=1e-9, rtol=1e-9)


def test_by_hand():
    # scores in slot order 0 5 1 4 0 3; a budget of 4 is 3 remembered tokens and the query's own
    k = torch.tensor([0.0, 5, 1, 4, 0, 3, 0, 0, 0, 0, 0]).view(1, 1, 11, 1)
    q = torch.ones(1, 1, 11, 1)
    found = [p for p, _ in steps(Recycled(budget=4, stride=5, kernel=1), (q, k, k), 6, 11)]
    assert isinstance(found[0], Full) and isinstance(found[5], Full)
    read = [sorted(p.index.flatten().tolist()) for p in found[1:5]]
    # slot 5 goes first (lowest score), then 3, then 1
    assert read == [[1, 3, 5, 6], [1, 3, 6, 7], [1, 6, 7, 8], [6, 7, 8, 9]]


def test_max_pooling_keeps_neighbours_and_shifts_nothing():
    k = torch.zeros(1, 1, 40, 1)
    k[0, 0, 20] = 9.0
    q = torch.ones(1, 1, 40, 1)
    (_, _), (pattern, _) = steps(Recycled(budget=8, kernel=7), (q, k, k), 39, 40)
    assert sorted(pattern.index.flatten().tolist()) == [17, 18, 19, 20, 21, 22, 23, 39]


def test_stride_one_and_a_large_budget_are_dense():
    tensors = drawn(1, 2, 1, 60)
    for method in (Recycled(budget=8, stride=1), Recycled(budget=60), Recycled(budget=1.0)):
        assert all(isinstance(p, Full) for p, _ in steps(method, tensors, 40, 60))


@pytest.mark.parametrize("threshold", [2.0, 0.6])
@pytest.mark.parametrize("together", [True, False])
def test_drafts_and_steps_of_many_tokens_change_nothing(threshold, together):
    # one memory sees single steps only; the other sees several tokens at once, after drafts that are taken back
    method = Recycled(budget=12, stride=3, threshold=threshold, kernel=3, together=together)
    real, draft = drawn(2, 4, 2, 200), drawn(2, 4, 2, 200, seed=1)
    plain = [o for _, o in steps(method, real, 101, 190)]
    memory, M, sizes = {}, 100, torch.randint(1, 17, (60,)).tolist()
    kinds = set()
    while M < 170:
        guessed, size = sizes.pop(), sizes.pop()
        joined = [torch.cat((a[:, :, :M], b[:, :, M:]), 2) for a, b in zip(real, draft, strict=True)]
        q, k, _, call = at(joined, M + guessed, guessed, memory)
        method.select(q, k, call)
        q, k, v, call = at(real, M + size, size, memory)
        pattern = method.select(q, k, call)
        kinds.add(type(pattern))
        torch.testing.assert_close(answer(q, k, v, pattern), torch.cat(plain[M - 100 : M - 100 + size], 2))
        M += size
    assert Union in kinds


def test_another_prompt_begins_with_a_full_step():
    tensors = drawn(1, 2, 1, 300)
    method, memory = Recycled(budget=12, stride=100), {}
    for M in range(100, 110):
        q, k, v, call = at(tensors, M, memory=memory)
        apply(q, k, v, call, [(None, method)])
    # 30 tokens of the answer and the question are taken back, others come through a dense prefill
    for length in (105, 110, 140):
        kept = copy.deepcopy(memory)
        q, k, v, call = at(tensors, length, length - 90, kept)
        apply(q, k, v, call, [])
        q, k, v, call = at(tensors, length + 1, 1, kept)
        assert isinstance(method.select(q, k, call), Full)
    q, k, v, call = at(tensors, 110, memory=memory)
    assert isinstance(method.select(q, k, call), Tokens)


def turning(B, M, start, turns):
    """Queries that look one way and at some steps another: q [B,2,M,16], each row with its own turns."""
    g = torch.Generator().manual_seed(3)
    ways = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64)).Q
    q = torch.zeros(B, 2, M, 16, dtype=torch.float64)
    for b in range(B):
        now = 0
        for t in range(M):
            now += t in turns[b]
            q[b, :, t] = ways[now] * torch.tensor([1.0, 3.0], dtype=torch.float64)[:, None]
    return 4 * q


def test_the_query_decides_and_rows_decide_apart():
    q = turning(2, 60, 40, [{45}, {52, 53}])
    k, v = drawn(2, 1, 1, 60, D=16)[1:]
    method = Recycled(budget=10, stride=4, threshold=0.9)
    memory, dense = {}, [[], []]
    for M in range(40, 61):
        qq, kk, vv, call = at((q, k, v), M, memory=memory)
        pattern = method.select(qq, kk, call)
        mask = pattern.mask(call)
        for b in range(2):
            dense[b] += [M - 1] if bool(mask[b].all()) else []
        count = sum(M - 1 in row for row in dense)
        assert method.estimate(call) == count * 2 * M
        assert isinstance(pattern, {0: Tokens, 1: Union, 2: Full}[count])
        torch.testing.assert_close(
            answer(qq, kk, vv, pattern),
            torch.softmax((4 * qq / 16 @ kk.transpose(-1, -2)).masked_fill(~mask, -math.inf), -1) @ vv,
        )
    # looks at 39 + 4n; row 0 turns at 45 and is seen at 47, row 1 at 52 and 53, seen at 55
    assert dense == [[39, 47], [39, 55]]


def test_a_row_compares_with_its_own_last_full_step():
    # row 0 turns at every step; row 1 drifts so slowly that only the way from its last full step is far enough
    angle = torch.arange(60, dtype=torch.float64) * 0.04
    q = torch.zeros(2, 2, 60, 16, dtype=torch.float64)
    q[0, :, torch.arange(60), torch.arange(60) % 16] = 3.0
    q[1, :, :, 0], q[1, :, :, 1] = 3 * angle.cos(), 3 * angle.sin()
    k, v = drawn(2, 1, 1, 60, D=16)[1:]
    method = Recycled(budget=10, stride=4, threshold=0.9)

    def full(rows):
        found = steps(method, (q[rows], k[rows], v[rows]), 30, 60)
        calls = [Call.of(q[rows][:, :, :1], k[rows][:, :, : 30 + n]) for n in range(31)]
        return [29 + n for n, (p, _) in enumerate(found) if bool(p.mask(calls[n])[-1].all())]

    # cos(0.04 * 12) is the first below 0.9
    assert full([1]) == full([0, 1]) == [29, 41, 53]


def test_thresholds_at_the_ends():
    q = turning(1, 60, 40, [{45, 50}])
    tensors = (q, *drawn(1, 1, 1, 60, D=16)[1:])

    def full(**args):
        found = steps(Recycled(budget=10, **args), tensors, 40, 60)
        return [39 + n for n, (p, _) in enumerate(found) if isinstance(p, Full)]

    assert full(stride=4, threshold=-1) == [39]
    assert full(stride=4, threshold=1.01) == list(range(39, 60, 4))
    assert full(stride=4, threshold=0.5) == [39, 47, 51]
    assert full(stride=1, threshold=0.5) == [39, 45, 50]


def test_only_looks_wait_for_the_device(monkeypatch):
    # the fixed schedule never compares queries
    monkeypatch.setattr(torch.nn.functional, "cosine_similarity", lambda *a, **kw: pytest.fail("compared"))
    tensors = drawn(1, 2, 1, 60)
    steps(Recycled(budget=10, stride=4), tensors, 40, 60)
    steps(Recycled(budget=10, stride=4, threshold=-1.0), tensors, 40, 60)


def test_a_moving_target_is_found_again():
    # the text asks for one fact after another, as in a chain of keys; each fact is four tokens somewhere in the prompt
    g = torch.Generator().manual_seed(0)
    D, start, every, budget = 32, 600, 24, 33
    facts = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q[:5]
    places = [40, 200, 310, 420, 505]
    M = start + every * len(facts)
    k = 0.3 * torch.randn(1, 1, M, D, generator=g, dtype=torch.float64)
    for fact, place in zip(facts, places, strict=True):
        k[0, 0, place : place + 4] += 4 * fact
    asked = facts.repeat_interleave(every, 0)
    # the turns come at odd times: the schedule must not fit by luck
    asked = torch.cat((asked[5:], asked[-1:].expand(5, -1)))
    q = torch.zeros(1, 1, M, D, dtype=torch.float64)
    q[0, 0, start:] = 12 * asked + 0.5 * torch.randn(M - start, D, generator=g, dtype=torch.float64)

    def kept(method):
        """Share of the attention mass that is read in the steps that are not full, and the full steps."""
        memory, mass, full = {}, [], 0
        for length in range(start + 1, M + 1):
            qq, kk, _, call = at((q, k, k), length, memory=memory)
            pattern = method.select(qq, kk, call)
            full += isinstance(pattern, Full)
            probs = torch.softmax(qq @ kk.transpose(-1, -2) / D**0.5, -1)
            assert isinstance(pattern, Full) or pattern.mask(call).sum() == budget
            mass.append(float((probs * pattern.mask(call)).sum()))
        return sum(mass) / len(mass), full

    never, once = kept(Recycled(budget=budget, threshold=-1))
    schedule, regular = kept(Recycled(budget=budget, stride=9))
    trigger, called = kept(Recycled(budget=budget, stride=3, threshold=0.8))
    assert (once, regular, called) == (1, 14, 5)
    window, lot = [], []
    for length in range(start + 1, M + 1):
        qq, kk, _, call = at((q, k, k), length)
        probs = torch.softmax(qq @ kk.transpose(-1, -2) / D**0.5, -1)
        window.append(float((probs * Window(1, budget - 1).mask(call)).sum()))
        lot.append(float(probs[..., torch.randperm(length, generator=g)[:budget]].sum()))
    window, lot = sum(window) / len(window), sum(lot) / len(lot)
    # one fact of five, against all but the steps between a turn and the next look
    assert never < 0.35
    assert schedule > never + 0.35
    assert trigger > 0.85 and trigger > schedule + 0.05
    assert max(window, lot) < 0.2


def test_estimate_counts_what_full_steps_score():
    tensors = drawn(2, 4, 2, 60)
    method, memory, costs = Recycled(budget=10, stride=4), {}, []
    for M in range(40, 49):
        q, k, _, call = at(tensors, M, memory=memory)
        method.select(q, k, call)
        costs.append(method.estimate(call))
    assert costs == [2 * 4 * M if M in (40, 44, 48) else 0 for M in range(40, 49)]


def test_a_share_is_of_the_keys_at_the_first_full_step():
    tensors = drawn(1, 2, 1, 70)
    found = [p for p, _ in steps(Recycled(budget=0.25, stride=3), tensors, 40, 70)]
    assert {p.index.shape[-1] for p in found if isinstance(p, Tokens)} == {10}


def test_padded_rows_and_evicted_stores_are_refused():
    q, k, _ = drawn(1, 2, 1, 50)
    pos = torch.arange(50)[None, None].clone()
    pos[..., :5] = -1
    with pytest.raises(UnsupportedError, match=r"Recycled: needs .* row"):
        Recycled(budget=8).select(q[:, :, -1:], k, Call.of(q[:, :, -1:], k, q_pos=torch.tensor([[49]]), k_pos=pos))


@pytest.mark.parametrize(
    "args",
    [
        {"budget": 0},
        {"budget": 1},
        {"stride": 0},
        {"kernel": 4},
        {"kernel": 0},
        {"threshold": -1.5},
        {"threshold": True},
    ],
)
def test_refuses(args):
    with pytest.raises(InputError, match="Recycled"):
        Recycled(**args)
