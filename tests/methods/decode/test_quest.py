"""What is true of Quest: a page's bound is never below its largest score, and pages are summarised once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.call import Call, Filled
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Blocks, Full
from saccade.kernels import summaries as summaries_module
from saccade.methods.apply import apply
from saccade.methods.decode import quest as quest_module
from saccade.methods.decode.quest import Quest
from saccade.testing import instances
from saccade.testing.inputs import run, stream


def drawn(B, H, G, N, M, D=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, n, D, generator=g, dtype=torch.float64) for heads, n in ((H, N), (G, M), (G, M))]


def at(q, k, v, M, n=1, memory=None, **fields):
    """The call of the newest n of M tokens: q, k, v and call."""
    q, k, v = q[:, :, M - n : M], k[:, :, :M], v[:, :, :M]
    return q, k, v, Call.of(q, k, memory={} if memory is None else memory, **fields)


def paper(q, k, v, page, pages):
    """Quest's decode step for one query q [D] over keys k [M][D], in plain floats: the output and the pages read."""
    M, D = len(k), len(q)
    own = (M - 1) // page
    bounds = {}
    for p in range(own):
        rows = k[p * page : (p + 1) * page]
        total = 0.0
        for d in range(D):
            low, high = min(r[d] for r in rows), max(r[d] for r in rows)
            total += max(q[d] * low, q[d] * high)
        bounds[p] = total
    read = {own, *sorted(bounds, key=lambda p: -bounds[p])[: pages - 1]}
    slots = [j for j in range(M) if j // page in read]
    scores = torch.tensor([sum(a * b for a, b in zip(q, k[j], strict=True)) for j in slots], dtype=torch.float64)
    weights = torch.softmax(scores / D**0.5, 0)
    return weights @ torch.tensor([v[j] for j in slots], dtype=torch.float64), read


@pytest.mark.parametrize("M", [1, 7, 15, 16, 17, 63, 64, 65, 130, 200])
def test_matches_paper_loop(M):
    q, k, v = drawn(2, 4, 2, 1, M, seed=M)
    method = Quest(budget=20, block_k=4, first=0)
    call = Call.of(q, k)
    pattern = method.select(q, k, call)
    o = method.attend(q, k, v, Call.of(q, k)).o
    assert isinstance(pattern, Full) == (M <= 20)
    for b in range(2):
        for h in range(4):
            want, read = paper(q[b, h, 0].tolist(), k[b, h // 2].tolist(), v[b, h // 2].tolist(), 4, 5)
            torch.testing.assert_close(o[b, h, 0], want, atol=1e-9, rtol=1e-9)
            if isinstance(pattern, Blocks):
                assert set(pattern.index[b, h, 0].tolist()) == read


@settings(deadline=None, max_examples=40)
@given(page=st.integers(1, 9), pages=st.integers(1, 6), D=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_a_bound_is_never_below_the_largest_score(page, pages, D, seed):
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(1, 1, page * pages, D, generator=g, dtype=torch.float64)
    q = torch.randn(1, 1, 3, D, generator=g, dtype=torch.float64)
    method = Quest(block_k=page)
    low, high = method._bounds(k).chunk(2, -1)
    bound = (torch.maximum(q[..., None, :] * low[:, :, None], q[..., None, :] * high[:, :, None])).sum(-1)
    most = (q @ k.transpose(-1, -2)).unflatten(-1, (pages, page)).amax(-1)
    assert (bound >= most - 1e-12).all()
    # tight where a page is one key
    assert page > 1 or torch.allclose(bound, most)


def test_by_hand():
    # pages of 2: page 0 holds (4, 0) and (0, 4), bound 8 for the query (1, 1); page 1 holds (3, 3) twice, 6
    k = torch.tensor([[4.0, 0], [0, 4], [3, 3], [3, 3], [0, 0], [0, 0], [0, 0]]).view(1, 1, 7, 2)
    q = torch.ones(1, 1, 1, 2)
    read = Quest(budget=4, block_k=2, first=0).select(q, k, Call.of(q, k)).index.flatten().tolist()
    assert read == [0, 3]
    read = Quest(budget=6, block_k=2, first=0).select(q, k, Call.of(q, k)).index.flatten().tolist()
    assert read == [0, 1, 3]
    # a query with a negative feature wants small values there
    q = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)
    k[0, 0, 5, 1] = -9.0
    assert Quest(budget=4, block_k=2, first=0).select(q, k, Call.of(q, k)).index.flatten().tolist() == [2, 3]


def test_first_layers_are_dense():
    q, k, _ = drawn(1, 2, 1, 1, 100)
    method = Quest(budget=16, block_k=4, first=2)
    found = [method.select(q, k, Call.of(q, k, layer=n)) for n in range(4)]
    assert [isinstance(p, Full) for p in found] == [True, True, False, False]
    costs = [method.estimate(Call.of(q, k, layer=n)) for n in range(4)]
    # two products for each of 25 pages and 2 heads
    assert costs == [0, 0, 100, 100]
    assert Quest(budget=100, first=0).estimate(Call.of(q, k)) == 0


def test_a_page_is_summarised_once(monkeypatch):
    q, k, v = drawn(1, 2, 1, 90, 90)
    seen, real = [], Quest._bounds
    monkeypatch.setattr(Quest, "_bounds", lambda self, keys: (seen.append(keys.shape[2]), real(self, keys))[1])
    method, memory = Quest(budget=16, block_k=8, first=0), {}
    for M in range(50, 91):
        method.select(*[t for i, t in enumerate(at(q, k, v, M, memory=memory)) if i != 2])
    # 6 pages of the prompt at once, then each new one alone, in the step that fills it
    assert seen == [48, 8, 8, 8, 8, 8]


@pytest.mark.parametrize("together", [False, True])
def test_memory_is_what_a_new_memory_would_be(together):
    # steps of many sizes, before each a draft that is taken back whole
    method = Quest(budget=24, block_k=5, first=0, together=together)
    real, draft = drawn(2, 4, 2, 260, 260), drawn(2, 4, 2, 260, 260, seed=1)
    memory, M, sizes = {}, 120, torch.randint(1, 17, (40,)).tolist()
    while M < 240:
        guessed, size = sizes.pop(), sizes.pop()
        joined = [torch.cat((a[:, :, :M], b[:, :, M:]), 2) for a, b in zip(real, draft, strict=True)]
        for tensors, n in ((joined, guessed), (real, size)):
            q, k, _, call = at(*tensors, M + n, n, memory)
            want = method.select(q, k, Call.of(q, k))
            assert torch.equal(method.select(q, k, call).index, want.index)
        M += size


def test_tokens_written_over_by_others_are_seen():
    # a question and its answer are taken back; another question, longer or shorter, comes through a dense prefill
    q, k, v = drawn(1, 2, 1, 300, 300)
    other = drawn(1, 2, 1, 300, 300, seed=9)
    method = Quest(budget=24, block_k=8, first=0)
    for second in (20, 30, 40):
        memory = {}
        for M in range(200, 231):
            qq, kk, vv, call = at(q, k, v, M, memory=memory)
            apply(qq, kk, vv, call, [(None, method)])
        joined = [torch.cat((a[:, :, :200], b[:, :, 200:]), 2) for a, b in zip((q, k, v), other, strict=True)]
        qq, kk, vv, call = at(*joined, 200 + second, second, memory)
        apply(qq, kk, vv, call, [])
        qq, kk, vv, call = at(*joined, 201 + second, 1, memory)
        got = apply(qq, kk, vv, call, [(None, method)])
        want = apply(qq, kk, vv, Call.of(qq, kk), [(None, method)])
        torch.testing.assert_close(got, want)


def test_heads_with_their_own_state_share_a_memory():
    q, k, v = drawn(1, 4, 2, 120, 120)
    memory = {}
    pairs = [((0, 3), Quest(budget=16, block_k=4, first=0)), ((1, 2), Quest(budget=30, block_k=10, first=0))]
    for M in range(100, 121):
        qq, kk, vv, call = at(q, k, v, M, memory=memory)
        got = apply(qq, kk, vv, call, pairs)
        for heads, method in pairs:
            alone = method.attend(qq, kk, vv, Call.of(qq, kk)).o
            torch.testing.assert_close(got[:, list(heads)], alone[:, list(heads)])


def test_together_reads_one_list_for_a_group():
    q, k, _ = drawn(1, 4, 2, 3, 150)
    method = Quest(budget=40, block_k=8, first=0, together=True)
    index = method.select(q, k, Call.of(q, k)).index
    assert index.shape == (1, 2, 3, 5)
    low, high = method._bounds(k[:, :, :144]).chunk(2, -1)
    for g in range(2):
        for row in range(3):
            own = (147 + row) // 8
            share = torch.full((own,), -float("inf"), dtype=torch.float64)
            for h in (2 * g, 2 * g + 1):
                x = q[0, h, row]
                bound = torch.maximum(x * low[0, g, :own], x * high[0, g, :own]).sum(-1) / 8**0.5
                share = torch.maximum(share, bound.softmax(0))
            want = {own, *share.topk(4).indices.tolist()}
            assert set(index[0, g, row].tolist()) == want


def recall(mask, probs):
    """Attention mass on what is read, of the mass that is to be had."""
    return float((mask * probs).sum(-1).mean())


def test_keeps_more_mass_than_mean_pages_a_window_and_chance():
    # keys with a few large features of either sign: what a mean cancels, a bound keeps
    g = torch.Generator().manual_seed(1)
    M, D, H, page, pages = 2048, 32, 8, 16, 8
    k = torch.randn(1, H, M, D, generator=g, dtype=torch.float64)
    hot = torch.randint(0, M - page, (H, 12), generator=g)
    q = 1.5 * torch.randn(1, H, 1, D, generator=g, dtype=torch.float64)
    for h in range(H):
        k[0, h, hot[h]] = q[0, h, 0] * 1.3 + torch.randn(12, D, generator=g, dtype=torch.float64)
        k[0, h, hot[h] + 1] = -q[0, h, 0] * 1.3
    probs = torch.softmax(q @ k.transpose(-1, -2) / D**0.5, -1)
    call = Call.of(q, k)
    quest = recall(Quest(budget=page * pages, block_k=page, first=0).select(q, k, call).mask(call), probs)

    def of_pages(scores):
        own = M // page - 1
        scores = scores.index_fill(-1, torch.tensor([own]), float("inf"))
        best = scores.topk(pages, -1).indices
        return recall(Blocks(best.int(), 1, page).mask(call), probs)

    mean = of_pages(q @ k.unflatten(2, (-1, page)).mean(3).transpose(-1, -2))
    lot = of_pages(torch.rand(1, H, 1, M // page, generator=g, dtype=torch.float64))
    truth = of_pages(probs.unflatten(-1, (-1, page)).sum(-1))
    window = float(probs[..., -page * pages :].sum(-1).mean())
    assert truth > 0.9
    assert quest > 0.75 * truth
    assert quest > mean + 0.2
    assert quest > max(lot, window) + 0.4


def test_padded_rows_and_evicted_stores_are_refused():
    q, k, v = drawn(1, 2, 1, 1, 50)
    pos = torch.arange(50)[None, None].clone()
    pos[..., :5] = -1
    call = Call.of(q, k, q_pos=torch.tensor([[49]]), k_pos=pos)
    with pytest.raises(UnsupportedError, match=r"Quest: needs .* row"):
        Quest(budget=8, first=0).select(q, k, call)


@pytest.mark.parametrize("args", [{"budget": 0}, {"budget": 1.5}, {"block_k": 0}, {"first": -1}, {"first": True}])
def test_refuses(args):
    with pytest.raises(InputError, match="Quest"):
        Quest(**args)


def test_half_precision_keys_keep_their_bounds():
    q, k, _ = drawn(1, 2, 1, 1, 100)
    q, k = q.bfloat16(), k.bfloat16()
    memory = {}
    Quest(budget=16, block_k=4, first=0).select(q, k, Call.of(q, k, memory=memory))
    rows = next(iter(memory.values()))["rows"][:, :, :25]
    low = k.float().view(1, 1, 25, 4, 8).amin(3)
    assert rows.dtype == torch.float32 and torch.equal(rows[..., :8], low)


def test_room_grows_by_an_eighth():
    q, k, v = drawn(1, 1, 1, 40, 600, D=2)
    memory, most = {}, 0
    for M in range(20, 41):
        call = at(q, k, v, M, memory=memory)[3]
        rows = summaries_module.summaries(k[:, :, :M], 1, call, "sum", lambda x: x)
        assert torch.equal(rows, k[:, :, :M])
        most = max(most, next(iter(memory.values()))["rows"].shape[2])
    assert 40 <= most <= 40 + 40 // 8 + 2 * summaries_module.ROOM


def test_a_decoded_sequence_reads_what_single_calls_read():
    # through the store, over layers
    method, sequence = instances()["quest"], stream(60, seed=4)
    together = run(method, sequence, [40, 16, 4])
    single = run(method, sequence, [40, *[1] * 20])
    torch.testing.assert_close(together, single)


@pytest.mark.parametrize("budget", [24, 0.3])
@pytest.mark.parametrize("kernels", [False, True])
def test_over_a_store_that_stands_still_it_chooses_what_it_would_choose(budget, kernels, monkeypatch):
    if kernels:
        pytest.importorskip("triton", reason="the kernels need Triton, which has no wheel for this platform")
        monkeypatch.setattr(quest_module, "on_gpu", lambda *tensors, width: True)
    tensors = [t.float() for t in drawn(1, 4, 2, 70, 70)]
    method, memory, start, M = Quest(budget=budget, block_k=5, first=0), {}, 41, 64
    room = tensors[1][:, :, :M].clone()
    room[:, :, start:] = 0.0
    for length in range(start + 1, M + 1):
        q, k, _, call = at(*tensors, length)
        want = set(method.select(q, k, call).index[0, 3, 0].tolist())
        room[:, :, length - 1] = tensors[1][:, :, length - 1]
        now = torch.tensor([length])
        fields = dict(q_pos=(now - 1)[None], k_pos=torch.arange(M)[None, None], memory=memory)
        fields["filled"] = Filled(now, start + 1, length - 1)
        found = method.select(q, room, Call.of(q, room, **fields)).index[0, 3, 0].tolist()
        assert set(found) - {-1} == want and len(set(found) - {-1}) + found.count(-1) == len(found)
