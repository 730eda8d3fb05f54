"""Watching: nothing is read from the device meanwhile, each head is told apart, and gaps are noticed."""

import math
from dataclasses import replace

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Blocks, Full, PerHead, Tokens, Union, Window
from saccade.evaluate import look as module
from saccade.evaluate.costs import read_bytes
from saccade.evaluate.look import Look, dense_rows
from saccade.methods.apply import Seen

H, G = 4, 2


def drawn(heads, lines, count, high):
    rows = [torch.randperm(high)[:count] for _ in range(heads * lines)]
    return torch.stack(rows).view(1, heads, lines, count).int()


def patterns(N, M):
    blocks = Blocks(drawn(G, -(-N // 16), 2, -(-M // 8)), 16, 8)
    return {
        "full": Full(),
        "window": Window(3, 9),
        "windows": Window(torch.tensor([0, 1, 2, 3]), torch.tensor([4, 1, 30, 2])),
        "blocks": blocks,
        "tokens": Tokens(drawn(H, 1, 6, M)),
        "columns": Union((blocks, Tokens(drawn(H, 1, 6, M)))),
        "near": Union((blocks, Window(2, 7))),
        "three": Union((Window(1, 1), Window(2, 7), blocks)),
        "mixed": PerHead((((2,), Full()), ((0, 3, 1), Window(1, 5)))),
    }


SIZES = {"prefill": (150, 150), "decode": (1, 70), "draft": (5, 90)}


def seen_of(pattern, N, M, holes=False, heads=(), **more):
    q, k, v, o = (torch.randn(1, n, m, 8) for n, m in ((H, N), (G, M), (G, M), (H, N)))
    where = {}
    if holes:
        slots = torch.stack([torch.randperm(M + 20)[:M].sort().values for _ in range(G)])
        where = dict(k_pos=slots[None], q_pos=torch.arange(M + 20 - N, M + 20)[None])
    return Seen(Call.of(q, k, heads=heads, **where), q, k, v, pattern, 12.0, ("m",), None, o, **more)


def to_meta(value):
    """The same with tensors that have shapes and no numbers: whoever reads one fails."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(to_meta(item) for item in value)
    if isinstance(value, (Seen, Call, Full, Window, Blocks, Tokens, Union, PerHead)):
        return replace(value, **{name: to_meta(item) for name, item in vars(value).items()})
    return value


@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", patterns(1, 50))
def test_watching_reads_no_number_from_the_device(name, size, holes):
    N, M = SIZES[size]
    seen = to_meta(seen_of(patterns(N, M)[name], N, M, holes))
    assert seen.q.device.type == seen.o.device.type == "meta"
    Look()(seen)
    Look()(replace(seen, bias=torch.zeros(1, G, M, device="meta")))


def test_nor_does_watching_an_evicted_store():
    look = Look(evicts=True)
    look(to_meta(seen_of(Full(), 150, 150)))
    look(to_meta(seen_of(Full(), 1, 151)))
    look(to_meta(seen_of(Full(), 1, 40, holes=True)))
    with pytest.raises(NotImplementedError):
        look.density("decode")


@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", patterns(1, 50))
def test_each_head_by_its_row_of_the_mask(name, size, holes):
    N, M = SIZES[size]
    look, phase = Look(), "prefill" if N == M else "decode"
    sums, bytes_read = {}, 0.0
    for _ in range(2):
        seen = seen_of(patterns(N, M)[name], N, M, holes, heads=(8, 2, 5, 1))
        mask = seen.pattern.mask(seen.call)[0]
        allowed = M * N - N * (N - 1) // 2 if not holes else int((seen.call.q_pos + 1).sum())
        bytes_read += read_bytes(seen)
        for i, head in enumerate(seen.call.heads):
            scores = [
                [float(seen.q[0, i, n] @ seen.k[0, i // 2, j]) / math.sqrt(8) for j in range(M)]
                for n in range(max(0, N - 3), N)
            ]
            kept = 0.0
            for scored, n in zip(scores, range(max(0, N - 3), N), strict=True):
                at = seen.call.k_pos[0, i // 2] if holes else torch.arange(M)
                past = at <= (seen.call.q_pos[0, n] if holes else M - N + n)
                weights = torch.tensor(scored, dtype=torch.double).exp() * past
                kept += float((weights * mask[i, n]).sum() / weights.sum())
            mine = sums.setdefault(head, [0.0, 0.0, 0.0])
            mine[0] += int(mask[i].sum()) + 12.0 / 4
            mine[1] += allowed
            mine[2] += kept / len(scores) / 2
        look(seen)
    # reading twice gives the same
    for _ in range(2):
        grid = look.grid(phase, "density", 1, 9)[0]
        assert [grid[h] for h in (0, 3, 4, 6, 7)] == [None] * 5
        for head, (pairs, allowed, _) in sums.items():
            assert grid[head] == pytest.approx(pairs / allowed, abs=1e-4)
        whole = sum(p for p, _, _ in sums.values()) / sum(a for _, a, _ in sums.values())
        assert look.density(phase) == pytest.approx(whole)
    if N <= 3:
        mass = look.grid(phase, "mass", 1, 9)[0]
        for head, (_, _, kept) in sums.items():
            assert mass[head] == pytest.approx(kept, abs=2e-4)
    if phase == "decode":
        assert look.step_bytes() == bytes_read / (2 * N)


def test_a_gap_is_noticed_when_the_figures_are_asked_for():
    look = Look(evicts=True)
    look(seen_of(Full(), 50, 50))
    k_pos = torch.arange(10).expand(1, G, -1)
    seen = seen_of(Full(), 1, 10)
    # tokens 50 and 51 went by unwatched
    look(replace(seen, call=replace(seen.call, q_pos=torch.tensor([[52]]), k_pos=k_pos)))
    with pytest.raises(InputError, match="token 52 and 51 were seen"):
        look.density("decode")
    with pytest.raises(InputError, match="token 60 and 51 were seen"):
        look2 = Look(evicts=True)
        look2(seen_of(Full(), 50, 50))
        look2(seen_of(Full(), 1, 61))
    late = Look(evicts=True)
    with pytest.raises(InputError, match="token 52 and 1 were seen"):
        late(replace(seen, call=replace(seen.call, q_pos=torch.tensor([[52]]), k_pos=k_pos)))


@pytest.mark.parametrize("held", [1, 4 * 7 * 33, 1 << 25])
def test_dense_rows_in_any_number_of_pieces(monkeypatch, held):
    monkeypatch.setattr(module, "WEIGHTS", held)
    q, k, v = torch.randn(1, 12, 7, 8), torch.randn(1, 3, 33, 8), torch.randn(1, 3, 33, 5)
    k_pos = torch.stack([torch.randperm(60)[:33] for _ in range(3)])[None]
    k_pos[0, :, 4] = -1
    q_pos = torch.arange(53, 60)[None]
    found = dense_rows(q, k, v, q_pos, k_pos, 0.3)
    for h in range(12):
        for n in range(7):
            seen = (k_pos[0, h // 4] >= 0) & (k_pos[0, h // 4] <= q_pos[0, n])
            weights = (k[0, h // 4].double() @ q[0, h, n].double() * 0.3).exp() * seen
            want = (weights / weights.sum()) @ v[0, h // 4].double()
            torch.testing.assert_close(found[0, h, n].double(), want, atol=1e-5, rtol=1e-4)
