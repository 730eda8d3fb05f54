"""attend_moved against a loop that rotates each key by hand, and where it must equal ordinary attention."""

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Blocks
from saccade.core.rope import Rope
from saccade.kernels import moved
from saccade.kernels.attend import attend
from saccade.kernels.moved import attend_moved


def lists(B, H, N, M, bq, bk, K):
    """Random earlier blocks, and each row's own blocks."""
    out = torch.full((B, H, -(-N // bq), K), -1)
    for b in range(B):
        for h in range(H):
            for i in range(out.shape[2]):
                rows = range(M - N + i * bq, M - N + min((i + 1) * bq, N))
                own = sorted({p // bk for p in rows})
                past = torch.randperm(own[0])[: K - len(own)].tolist() if own[0] else []
                line = sorted([*past, *own])
                out[b, h, i, : len(line)] = torch.tensor(line)
    return out.int()


@pytest.mark.parametrize("tile", [1, 1 << 22])
@pytest.mark.parametrize(("N", "M", "bq", "bk"), [(24, 24, 8, 4), (13, 40, 4, 8), (1, 31, 1, 4), (5, 30, 1, 8)])
def test_against_a_loop(N, M, bq, bk, tile, monkeypatch):
    monkeypatch.setattr(moved, "TILE", tile)
    B, H, G, D, Dv, K = 2, 4, 2, 6, 5, 4
    free_q, free_k = torch.randn(B, H, N, D).double(), torch.randn(B, G, M, D).double()
    v = torch.randn(B, G, M, Dv).double()
    rope = Rope(torch.rand(2, dtype=torch.float64))
    q, k = rope(free_q, torch.arange(M - N, M)), rope(free_k, torch.arange(M))
    index = lists(B, H, N, M, bq, bk, K)
    out = attend_moved(q, k, v, Blocks(index, bq, bk), Call.of(q, k, scale=0.6, rope=rope))
    for b in range(B):
        for h in range(H):
            for i in range(N):
                p = M - N + i
                line = [c for c in index[b, h, i // bq].tolist() if c >= 0]
                slots = [s for c in line for s in range(c * bk, (c + 1) * bk)]
                new = {s: at for at, s in enumerate(slots)}
                seen = [s for s in slots if s <= p]
                turn = torch.tensor([new[p]])
                mine = rope(free_q[b : b + 1, h : h + 1, i : i + 1], turn).flatten()
                scores = [
                    0.6
                    * mine
                    @ rope(free_k[b : b + 1, h // 2 : h // 2 + 1, s : s + 1], torch.tensor([new[s]])).flatten()
                    for s in seen
                ]
                weights = torch.softmax(torch.stack(scores), 0)
                torch.testing.assert_close(out.o[b, h, i], weights @ v[b, h // 2, seen])
                torch.testing.assert_close(out.lse[b, h, i], torch.stack(scores).logsumexp(0))


def test_nothing_moves_while_nothing_is_left_out():
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 21, 8)
    index = torch.arange(6).expand(1, 1, 3, 6)
    call = Call.of(q, k, rope=Rope(torch.rand(4)))
    torch.testing.assert_close(attend_moved(q, k, k, Blocks(index, 4, 4), call).o, attend(q, k, k, None, call).o)


def test_gradients_flow():
    q, k = torch.randn(1, 1, 4, 4).double().requires_grad_(), torch.randn(1, 1, 12, 4).double().requires_grad_()
    call = Call.of(q, k, rope=Rope(torch.rand(2, dtype=torch.float64)))
    index = torch.tensor([[[[0, 2]]]])
    assert torch.autograd.gradcheck(lambda q, k: attend_moved(q, k, k * 2, Blocks(index, 4, 4), call).o, (q, k))


def test_what_it_cannot_do():
    q, k = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 12, 4)
    blocks = Blocks(torch.tensor([[[[0, 1]]]]), 4, 4)
    with pytest.raises(InputError, match="rope"):
        attend_moved(q, k, k, blocks, Call.of(q, k))
    with pytest.raises(InputError, match="own block"):
        attend_moved(q, k, k, blocks, Call.of(q, k, rope=Rope(torch.ones(2))))
