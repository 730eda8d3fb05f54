"""The backward kernels of attend: float64 autograd of dense softmax, lists and their transpose, what is refused."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.call import Call
from saccade.core.pattern import Blocks, Full, PerHead, Tokens, Union, Window
from saccade.kernels.attend import attend
from saccade.kernels.attend.lower import lower
from saccade.kernels.merge import merge

backward = pytest.importorskip("saccade.kernels.attend.triton_backward", reason="Triton is not installed")
lists = pytest.importorskip("saccade.kernels.attend.triton_readers", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def blocks(lines, columns, count, block_q, block_k, heads, rows=1):
    """Lists of distinct key blocks, some short, some empty."""
    index = torch.rand(rows, heads, lines, columns).argsort(-1)[..., :count]
    keep = torch.randint(0, index.shape[-1] + 1, (rows, heads, lines, 1))
    return Blocks(index.masked_fill(torch.arange(index.shape[-1]) >= keep, -1).int(), block_q, block_k)


def everything(lines, columns, block_q, block_k):
    """Every query block reads every key block."""
    return Blocks(torch.arange(columns).int().expand(1, 1, lines, columns), block_q, block_k)


def dense(q, k, v, mask, scale, bias):
    """Softmax attention, each query head on its own; rows without keys give 0 and a log-sum-exp of -inf."""
    outs, sums = [], []
    share = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        scores = scale * torch.einsum("bnd,bmd->bnm", q[:, h], k[:, h // share])
        if bias is not None:
            scores = scores + bias[:, h * bias.shape[1] // q.shape[1], None]
        # no -inf before the exponential: its gradient in an empty row would be NaN
        weights = torch.where(mask[:, h], scores, -1e4).sub(scores.detach().amax(-1, keepdim=True)).exp() * mask[:, h]
        total = weights.sum(-1)
        empty = total == 0
        safe = torch.where(empty, 1.0, total)
        outs.append(torch.einsum("bnm,bmd->bnd", weights / safe[..., None], v[:, h // share]))
        sums.append(torch.where(empty, float("-inf"), safe.log() + scores.detach().amax(-1)))
    return torch.stack(outs, 1), torch.stack(sums, 1)


def both(pattern, sizes, *, dtype=torch.float32, causal=True, bias=None, positions=None, do=True, dlse=True):
    """Gradients from the kernels and from float64 autograd, as two lists; o and lse are float64's."""
    B, H, G, N, M, D, Dv = sizes
    q, k, v = torch.randn(B, H, N, D), torch.randn(B, G, M, D), torch.randn(B, G, M, Dv)
    q, k, v = (t.to(dtype).double().requires_grad_() for t in (q, k, v))
    leaves = [q, k, v]
    if bias is not None:
        bias = torch.randn(bias).double().requires_grad_()
        leaves.append(bias)
    q_pos, k_pos = (None, None) if positions is None else positions
    call = Call.of(q, k, causal=causal, q_pos=q_pos, k_pos=k_pos)
    pattern.check(call)
    o, lse = dense(q, k, v, pattern.mask(call), call.softmax_scale(D), bias)
    do = torch.randn(o.shape).to(dtype).double() if do else None
    dlse = torch.randn(lse.shape).double() if dlse else None
    loss = 0.0 if do is None else (o * do).sum()
    loss = loss + (0.0 if dlse is None else (torch.where(lse.isneginf(), 0.0, lse) * dlse).sum())
    want = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    def here(t, kind):
        return None if t is None else t.detach().to(DEVICE, kind)

    got = backward.gradients(
        *(here(t, dtype) for t in (q, k, v, o)),
        here(lse, torch.float32),
        here(do, dtype),
        here(dlse, torch.float32),
        lower(pattern, call, DEVICE),
        call,
        here(bias, torch.float32),
        bias is not None,
    )
    return [t.cpu().double() for t in got if t is not None], want


def close(got, want, tolerance):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


def mixture(M):
    return PerHead(
        (
            ((2, 0), Union((Window(19, 23), blocks(-(-M // 32), -(-M // 16), 3, 32, 16, 2)))),
            ((3,), Full()),
            ((1,), blocks(-(-M // 64), -(-M // 32), 2, 64, 32, 1)),
        )
    )


CASES = {
    "full": (Full, (1, 2, 1, 70, 70, 16, 16), {}),
    "full behind a past": (Full, (1, 2, 1, 33, 101, 16, 32), {}),
    "full, one query": (Full, (2, 2, 2, 1, 40, 16, 16), {}),
    "full, not causal": (Full, (1, 2, 1, 50, 71, 16, 16), {"causal": False}),
    "full, three heads a key head": (Full, (1, 3, 1, 40, 40, 32, 16), {}),
    "window": (lambda: Window(5, 30), (1, 2, 1, 130, 130, 16, 16), {}),
    "window without sink": (lambda: Window(0, 7), (1, 2, 1, 97, 129, 16, 16), {}),
    "window with a wide sink": (lambda: Window(70, 3), (1, 2, 1, 129, 129, 16, 16), {}),
    "window of whole tiles": (lambda: Window(0, 95), (1, 1, 1, 130, 130, 16, 16), {}),
    "window, its sink a tile and one": (lambda: Window(33, 2), (1, 1, 1, 140, 140, 16, 16), {}),
    "window, not causal": (lambda: Window(40, 20), (1, 2, 1, 90, 110, 16, 16), {"causal": False}),
    "window of each head": (
        lambda: Window(torch.tensor([0, 40, 3, 70]), torch.tensor([1, 39, 29, 33])),
        (1, 4, 2, 70, 90, 16, 16),
        {},
    ),
    "blocks": (lambda: blocks(3, 4, 3, 32, 32, 4, 2), (2, 4, 2, 90, 101, 16, 16), {}),
    "blocks of a key head": (lambda: blocks(3, 3, 2, 32, 32, 2), (2, 4, 2, 90, 90, 16, 16), {}),
    "blocks for all": (lambda: blocks(2, 4, 3, 64, 32, 1), (2, 2, 2, 100, 100, 16, 16), {}),
    "blocks, not causal": (lambda: blocks(4, 5, 3, 32, 32, 2), (1, 2, 1, 101, 133, 16, 16), {"causal": False}),
    "blocks smaller than tiles": (lambda: blocks(6, 5, 3, 16, 16, 2), (1, 2, 1, 81, 79 + 2, 16, 16), {}),
    "blocks off all powers": (lambda: blocks(3, 10, 6, 24, 7, 2), (1, 2, 1, 70, 70, 16, 16), {}),
    "all blocks, one slot further": (lambda: everything(2, 3, 32, 32), (1, 1, 1, 64, 65, 16, 16), {}),
    "all wide blocks, one slot further": (lambda: everything(2, 2, 32, 64), (1, 1, 1, 64, 65, 16, 16), {}),
    "blocks with rows off all powers": (lambda: blocks(4, 7, 5, 24, 16, 2), (1, 2, 1, 90, 100, 16, 16), {}),
    "blocks of three tiles": (lambda: blocks(2, 2, 2, 48, 96, 2), (1, 2, 1, 90, 130, 16, 16), {}),
    "blocks larger than tiles": (lambda: blocks(1, 2, 2, 130, 100, 2), (1, 2, 1, 130, 140, 16, 16), {}),
    "blocks and window": (lambda: Union((blocks(7, 7, 4, 16, 16, 2), Window(20, 17))), (1, 2, 1, 101, 101, 16, 16), {}),
    "blocks that the sink leaves one slot of": (
        lambda: Union((blocks(2, 4, 4, 32, 16, 2), Window(31, 3))),
        (1, 2, 1, 64, 64, 16, 16),
        {},
    ),
    "blocks and window, not causal": (
        lambda: Union((blocks(6, 6, 3, 16, 16, 2), Window(20, 17))),
        (1, 2, 1, 90, 90, 16, 16),
        {"causal": False},
    ),
    "mixture": (lambda: mixture(75), (1, 4, 2, 75, 75, 16, 16), {}),
    "mixture with a bias": (lambda: mixture(40), (2, 4, 2, 40, 40, 16, 16), {"bias": (2, 4, 40)}),
    "bias of a key head": (lambda: Window(9, 20), (2, 4, 2, 40, 50, 16, 16), {"bias": (1, 2, 50)}),
    "bias for all": (lambda: blocks(2, 3, 2, 32, 32, 2), (2, 2, 2, 40, 70, 16, 16), {"bias": (1, 1, 70)}),
    "only o": (lambda: blocks(3, 3, 2, 32, 32, 2), (1, 2, 1, 70, 70, 16, 16), {"dlse": False}),
    "only lse": (lambda: Window(3, 30), (1, 2, 1, 70, 70, 16, 16), {"do": False}),
    "width 80": (lambda: blocks(2, 2, 2, 32, 32, 2), (1, 2, 1, 50, 50, 80, 80), {}),
    "width 256, values 96": (lambda: Window(4, 30), (1, 2, 1, 50, 50, 256, 96), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_dense_softmax(name):
    make, sizes, kind = CASES[name]
    close(*both(make(), sizes, **kind), 2e-6)


@pytest.mark.parametrize("kind", ["full", "window", "mixture"])
def test_padding(kind):
    # the first row lacks 5 tokens on its left, the second 20
    pos = (torch.arange(50)[None] - torch.tensor([[5], [20]])).clamp_min(-1)
    pattern = {"full": Full(), "window": Window(3, 17), "mixture": mixture(50)}[kind]
    got, want = both(pattern, (2, 4, 2, 50, 50, 16, 16), positions=(pos, pos[:, None]))
    close(got, want, 2e-6)
    for t in got:
        assert not t[0, :, :5].any() and not t[1, :, :20].any() and t[1, :, 20:30].any()


def test_holes_in_the_store_of_each_key_head():
    k_pos = torch.stack([torch.randperm(80)[:50].sort().values for _ in range(4)]).view(2, 2, 50)
    q_pos = torch.tensor([[60, 61, 79], [-1, 70, 79]])
    close(*both(Window(9, 30), (2, 4, 2, 3, 50, 16, 16), positions=(q_pos, k_pos)), 2e-6)


def test_half_precision():
    # twice what rounding o, the weights and the score gradients to 11 bits may cost here
    close(*both(mixture(75), (1, 4, 2, 75, 75, 16, 16), dtype=torch.float16), 2e-3)


def test_rows_without_keys_and_keys_without_rows_get_zero():
    index = torch.tensor([[0, -1], [-1, -1], [0, 2]]).int()[None, None]
    got, want = both(Blocks(index, 32, 32), (1, 2, 1, 90, 90, 16, 16))
    close(got, want, 2e-6)
    dq, dk, dv = got
    assert not dq[:, :, 32:64].any() and dq[:, :, 64:].any()
    assert not dk[:, :, 32:64].any() and not dv[:, :, 32:64].any() and dk[:, :, 64:].any()


def test_two_runs_agree_bit_for_bit():
    torch.manual_seed(3)
    one, _ = both(mixture(40), (1, 4, 2, 40, 40, 16, 16), bias=(1, 1, 40))
    torch.manual_seed(3)
    two, _ = both(mixture(40), (1, 4, 2, 40, 40, 16, 16), bias=(1, 1, 40))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_tensors_that_lie_awkwardly():
    """Heads behind tokens, room behind the tokens, one number for all, an axis of one, a start off all boundaries."""
    q = torch.randn(1, 50, 3, 4, 16)[:, :, 1].transpose(1, 2)
    k = torch.randn(1, 2, 80, 16)[:, :, :50]
    v = torch.randn(1 + 2 * 50 * 16)[1:].view(1, 2, 50, 16)
    call, pattern = Call.of(q, k), Window(3, 20)
    o, lse = dense(q, k, v, pattern.mask(call), call.softmax_scale(16), None)
    do = torch.ones(()).expand(o.shape)
    tensors = [t.to(DEVICE) for t in (q, k, v, o, lse, do)]
    rest = (None, lower(pattern, call, DEVICE), call)
    for a, b in zip(
        backward.gradients(*tensors, *rest)[:3],
        backward.gradients(*(t.clone(memory_format=torch.contiguous_format) for t in tensors), *rest)[:3],
        strict=True,
    ):
        assert torch.equal(a, b)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_any_sizes(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    torch.manual_seed(draw(0, 999))
    N = draw(1, 70)
    M, G, block_q, block_k = N + draw(0, 40), draw(1, 2), draw(1, 80), draw(1, 80)
    H, causal = G * draw(1, 2), data.draw(st.booleans())
    lines, columns = -(-N // block_q), -(-M // block_k)
    parts = (blocks(lines, columns, draw(1, 4), block_q, block_k, H), Window(draw(0, M), draw(1, M + 5)))
    pattern = data.draw(st.sampled_from([*parts, Union(parts)]))
    close(*both(pattern, (1, H, G, N, M, 16, 16), causal=causal), 2e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("windows", [True, False])
def test_lists_and_their_transpose(causal, windows):
    """Against a loop over all pairs of blocks: what is read, what needs no mask, who reads a key block."""
    N, M, bq, bk, L = 75, 90, 16, 20, 2
    nq, nk = -(-N // bq), -(-M // bk)
    pattern = blocks(nq, nk, 4, bq, bk, L)
    index = torch.where(pattern.index < 0, nk, pattern.index).sort(-1).values
    index = torch.where(index == nk, -1, index).int()
    sink, recent = (torch.tensor([0, 21]), torch.tensor([0, 30])) if windows else (torch.zeros(2), torch.zeros(2))
    lowered = SimpleNamespace(
        index=index.to(DEVICE),
        block_q=bq,
        block_k=bk,
        sink=sink.int().to(DEVICE),
        recent=recent.int().to(DEVICE),
        windows=windows,
    )
    found = [t.cpu() for t in lists.readers(lowered, N, M, causal, True)]
    order, split, rows, runs = found
    K = index.shape[3]
    readers = {}
    for head in range(L):
        for row in range(nq):
            want = [[], []]
            p = torch.arange(row * bq, min(N, row * bq + bq))[:, None] + M - N
            for block in index[0, head, row].tolist():
                if block < 0:
                    continue
                j = torch.arange(block * bk, block * bk + bk)[None]
                allowed = (j <= p) if causal else (j < M) | (p < 0)
                inside = (j < sink[head]) | ((p - j).abs() < recent[head])
                if (allowed & ~inside).any():
                    masked = int(not (allowed & ~inside).all())
                    want[masked].append(block)
                    readers.setdefault((head, block, masked), []).append(row)
            line = head * nq + row
            whole, masked = split[line].tolist()
            assert order[line, :whole].tolist() == want[0]
            # what the window covers is only dropped when it lies whole on one side: more may stay, and be masked away
            assert set(want[1]) <= set(order[line, K - masked :].tolist())
            for block in set(order[line, K - masked :].tolist()) - set(want[1]):
                readers.setdefault((head, block, 1), []).append(row)
    for head in range(L):
        for block in range(nk):
            at, whole, masked = runs[head * nk + block].tolist()
            assert rows[at : at + whole].tolist() == sorted(readers.get((head, block, 0), []))
            assert rows[at + whole : at + whole + masked].tolist() == sorted(readers.get((head, block, 1), []))


@pytest.mark.parametrize("share", [1, 3])
def test_first_keys_split_among_programs(monkeypatch, share):
    """A sink that all rows read: each head and stretch of rows sums on its own."""
    monkeypatch.setattr(backward, "STRETCH", 30)
    pattern = Union((Window(20, 9), blocks(3, 3, 2, 32, 32, 1)))
    got, want = both(pattern, (1, share, 1, 90, 90, 16, 32))
    close(got, want, 2e-6)


@pytest.mark.parametrize("split", [False, True])
def test_through_the_door(split):
    """attend(impl="triton") trains like the reference, also where two results are merged by their log-sum-exp."""
    q, k, v = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 32)
    weight, pattern = torch.randn(1, 4, 40, 32).to(DEVICE), mixture(40)

    def gradients(impl):
        leaves = [t.detach().to(DEVICE).requires_grad_() for t in (q, k, v)]
        if split:
            far = Blocks(torch.tensor([[-1], [0], [0]]).int()[None, None].to(DEVICE), 16, 16)
            near = Blocks(torch.tensor([[0, -1], [1, -1], [1, 2]]).int()[None, None].to(DEVICE), 16, 16)
            out = merge([attend(*leaves, part, impl=impl) for part in (far, near)])
        else:
            out = attend(*leaves, pattern, impl=impl)
        ((out.o * weight).sum() + out.lse.square().sum()).backward()
        return [t.grad.cpu() for t in leaves]

    for a, b in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_refused_is_said_in_words():
    q = torch.randn(1, 2, 8, 16)
    call = Call.of(q, q)

    def said(pattern=None, width=16, dtype=torch.float32):
        t = torch.randn(1, 2, 8, width, dtype=dtype)
        return backward.refuses_gradients(t, t, t, pattern or Full(), call, None)

    assert said() is None and said(Window(1, 2)) is None and said(width=80) is None
    tokens = Tokens(torch.zeros(1, 1, 1, 1).int())
    assert "Tokens" in said(tokens) and "Tokens" in said(Union((Full(), tokens)))
    assert "Tokens" in said(PerHead((((0,), Full()), ((1,), tokens))))
    assert "float64" in said(dtype=torch.float64)
    assert "264" in said(width=264) and "18" in said(width=18)
