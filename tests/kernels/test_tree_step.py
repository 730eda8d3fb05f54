"""The tree search of one query: it finds what a loop over ranges finds, whatever room lies behind the keys."""

import math

import pytest
import torch

from saccade.kernels.tree import rounds, tree_search
from saccade.kernels.tree_step import tree_step


def loop(q, k, start, stop, kept, block):
    """One query head in plain floats: ranges of blocks are halved, a half is judged by its first block."""
    keys = k.tolist()

    def judge(at):
        rows = keys[at * block : (at + 1) * block]
        return max(sum(a * b for a, b in zip(q.tolist(), row, strict=True)) for row in rows)

    span = max(0, stop - start)
    ranges = [(start + span * i // kept, start + span * (i + 1) // kept) for i in range(kept)]
    ranges = [(low, high) for low, high in ranges if low < high]
    while any(high - low > 1 for low, high in ranges):
        halves = []
        for low, high in ranges:
            middle = low + (high - low) // 2
            halves += [(low, middle), (middle, high)]
        halves = [(low, high) for low, high in halves if low < high]
        ranges = sorted(halves, key=lambda half: -judge(half[0]))[:kept]
    return sorted(low for low, _ in ranges)


# room, keys stored, blocks kept, keys of a block, first block, near past, blocks wanted now
SIZES = [
    (300, 280, 8, 4, 1, 10, None),
    (500, 350, 20, 8, 0, 30, 13),
    (64, 40, 6, 2, 2, 5, None),
    (64, 20, 7, 4, 1, 30, 3),
    (90, 90, 5, 3, 0, 1, 5),
    (90, 61, 40, 2, 0, 1, 33),
    (200, 1, 4, 4, 0, 8, None),
]


def case(size, B=2, H=4, G=2, D=8, dtype=torch.float64):
    M, L, kept, block, start, window, now = size
    q, k = torch.randn(B, H, 1, D, dtype=dtype), torch.randn(B, G, M + 9, D, dtype=dtype)[:, :, :M]
    k[:, :, L:] = 0.0
    length = torch.tensor([L])
    stop = -(-(length - window).clamp_min(0) // block)
    return q, k, length, stop, None if now is None else torch.tensor([now])


@pytest.mark.parametrize("size", SIZES)
def test_finds_what_the_loop_finds(size):
    _, L, kept, block, start, _, now = size
    q, k, length, stop, wanted = case(size)
    found = tree_step(q, k, start, stop, kept, block, length, wanted)
    assert found.shape == (2, 4, 1, kept) and found.dtype == torch.int32
    for b in range(2):
        for h in range(4):
            real = [i for i in found[b, h, 0].tolist() if i >= 0]
            want = loop(q[b, h, 0], k[b, h // 2, :L], start, int(stop), now or kept, block)
            assert real == want
            # in order, empties last
            assert found[b, h, 0, len(real) :].eq(-1).all()


@pytest.mark.parametrize("size", SIZES)
def test_is_the_search_of_many_queries_for_one(size):
    _, L, kept, block, start, _, now = size
    q, k, length, stop, wanted = case(size)
    found = tree_step(q, k, start, stop, kept, block, length, wanted)
    want = tree_search(q[:, :, :, None], k[:, :, :L], start, stop, now or kept, block)
    torch.testing.assert_close(found[..., : now or kept], want)
    assert found[..., now or kept :].eq(-1).all()


def behind(size):
    """A search whose last block is stored in part, and the same with keys behind that would win everywhere."""
    q, k, length, stop, _ = case(size, dtype=torch.float32)
    tempting = k.clone()
    tempting[:, :, size[1] :] = 1e6 * q[:, ::2].sign()
    assert int(stop) * size[3] > size[1]
    return q, k, tempting, length, stop


def test_room_behind_the_keys_is_never_looked_at():
    q, k, tempting, length, stop = behind((48, 22, 3, 4, 0, 1, None))
    assert torch.equal(*(tree_step(q, keys, 0, stop, 3, 4, length) for keys in (k, tempting)))


def test_nor_do_the_kernels_look_there():
    pytest.importorskip("triton", reason="the kernels need Triton, which has no wheel for this platform")
    from saccade.kernels import triton_tree

    q, k, tempting, length, stop = behind((48, 22, 3, 4, 0, 1, None))
    found = [
        triton_tree.search(q, keys, 0, stop, 3, 4, length, torch.tensor([3]), rounds(12, 3)) for keys in (k, tempting)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("size", [size for size in SIZES if math.log2(size[3]).is_integer()])
def test_the_kernels_find_the_same(size):
    pytest.importorskip("triton", reason="the kernels need Triton, which has no wheel for this platform")
    from saccade.kernels import triton_tree

    M, _, kept, block, start, _, _ = size
    q, k, length, stop, wanted = case(size, dtype=torch.float32)
    assert triton_tree.serves(q, kept, block)
    many = torch.tensor([kept]) if wanted is None else wanted
    halvings = rounds(-(-M // block) - start, kept)
    got = triton_tree.search(q, k, start, stop, kept, block, length, many, halvings)
    torch.testing.assert_close(got, tree_step(q, k, start, stop, kept, block, length, wanted))


def test_the_kernels_break_ties_and_keep_order():
    pytest.importorskip("triton", reason="the kernels need Triton, which has no wheel for this platform")
    from saccade.kernels import triton_tree

    # all products are equal: as many as wanted are found, each once, in order
    q, k = torch.ones(1, 2, 1, 8), torch.ones(1, 1, 256, 8)
    length, stop = torch.tensor([256]), torch.tensor([60])
    found = triton_tree.search(q, k, 1, stop, 7, 4, length, torch.tensor([7]), rounds(63, 7))[0, :, 0]
    assert (found.diff(dim=-1) > 0).all() and found.min() >= 1 and found.max() < 60
    assert not triton_tree.serves(q, 5000, 4) and not triton_tree.serves(q, 10, 12)
    assert not triton_tree.serves(q.double(), 10, 16)
