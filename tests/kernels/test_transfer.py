"""Checksums against plain Python, and the kernel that reads memory by address against a copy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.kernels import transfer

triton = pytest.importorskip("triton", reason="Triton is not installed")


def by_hand(row):
    """The sum of a row's words, each times its odd weight, modulo 2^64, as a signed number."""
    data = row.contiguous().view(torch.uint8).flatten().tolist()
    size = next(n for n in (8, 4, 2, 1) if len(data) % n == 0)
    total = 0
    for i in range(0, len(data), size):
        word = int.from_bytes(bytes(data[i : i + size]), "little", signed=True)
        total += word * (2 * (i // size * 2654435761 % 2**31) + 1)
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 1, 1), (3, 4, 64), (2, 7), (0, 5)])
def test_sums(dtype, shape):
    rows = (torch.randn(shape) * 50).to(dtype)
    assert transfer.sums(rows).tolist() == [by_hand(row) for row in rows]
    assert transfer.sums(torch.zeros_like(rows)).tolist() == [0] * len(rows)
    by = transfer.weights(transfer.words(rows.flatten(1)).shape[1]) if len(rows) else None
    assert torch.equal(transfer.sums(rows, by), transfer.sums(rows))
    folded = [(s % 2**64 ^ (s >> 32) % 2**64) % 2**32 - 2**31 for s in transfer.sums(rows).tolist()]
    assert transfer.marks(rows).tolist() == folded


def test_sums_of_what_is_no_whole_word_from_the_start():
    rows = torch.randn(9, 6)[1:, :].reshape(-1)[1:37].view(6, 6)
    assert transfer.sums(rows).tolist() == [by_hand(row) for row in rows]


@given(seed=st.integers(0, 10**6), what=st.sampled_from(["bit", "numbers", "rows"]))
@settings(deadline=None, max_examples=60)
def test_a_change_is_seen(seed, what):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, 6, 8, generator=g).bfloat16()
    other = rows.clone()
    i, j = torch.randperm(6, generator=g)[:2].tolist()
    if what == "bit":
        other.view(torch.int16)[0, i, 3] ^= 1 << int(torch.randint(0, 15, (), generator=g))
    elif what == "numbers":
        other[0, i, 2], other[0, j, 5] = rows[0, j, 5], rows[0, i, 2]
    else:
        other[0, [i, j]] = rows[0, [j, i]]
    assert torch.equal(rows, other) or (
        transfer.sums(rows) != transfer.sums(other) and transfer.marks(rows) != transfer.marks(other)
    )


@pytest.mark.parametrize(
    ("block", "width", "dtype"), [(5, 12, torch.float32), (64, 80, torch.float16), (3, 1, torch.float64)]
)
def test_blocks_come_from_their_addresses(block, width, dtype):
    slabs = [torch.randn(n, block, width).to(dtype) for n in (4, 7)]
    target, sums = torch.zeros(9, block, width, dtype=dtype), torch.zeros(9, dtype=torch.long)
    which = [(0, 3, 8), (1, 6, 0), (1, 0, 4), (0, 3, 5)]
    size = block * width * dtype.itemsize
    addresses = torch.tensor([slabs[s].data_ptr() + at * size for s, at, _ in which])
    places = torch.tensor([place for _, _, place in which])
    transfer.kernel().bring(addresses, places, target, sums)
    want = torch.zeros_like(target)
    for s, at, place in which:
        want[place] = slabs[s][at]
    assert torch.equal(target, want)
    assert torch.equal(sums, transfer.sums(want))
