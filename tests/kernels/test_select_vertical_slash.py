"""Vertical-slash as kernels: masses against a loop in float64, lists equal to PyTorch's and to a loop's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.call import Call
from saccade.kernels.select import vertical_slash
from saccade.kernels.select.vertical_slash import column_and_offset_mass, diagonal_blocks
from saccade.methods.select.minference import MInference

kernels = pytest.importorskip("saccade.kernels.select.triton_vertical_slash", reason="Triton is not installed")


def by_loop(q, k, last, scale):
    """Mass per key and per offset of one head: q [N, D], k [M, D]."""
    N, M = len(q), len(k)
    column, offset = [0.0] * M, [0.0] * M
    for i in range(max(0, N - last), N):
        p = M - N + i
        weights = [math.exp(sum(x * y for x, y in zip(q[i], key, strict=True)) * scale) for key in k[: p + 1]]
        for j, weight in enumerate(weights):
            column[j] += weight / sum(weights)
            offset[p - j] += weight / sum(weights)
    return column, offset


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(0, 150), st.sampled_from([3, 8, 20]), st.sampled_from([1, 7, 16, 33]))
def test_masses_match_the_loop(N, past, D, last):
    rng = torch.Generator().manual_seed(N * 7 + past)
    q, k = torch.randn(1, 4, N, D, generator=rng), torch.randn(1, 2, N + past, D, generator=rng) * 2
    call = Call.of(q, k, scale=0.4)
    kernel, plain = kernels.column_and_offset_mass(q, k, call, last), column_and_offset_mass(q, k, call, last)
    for h in range(0, 4, 3):
        want = by_loop(q[0, h].double().tolist(), k[0, h // 2].double().tolist(), last, 0.4)
        for got in (kernel, plain):
            for mass, truth in zip(got, want, strict=True):
                torch.testing.assert_close(mass[0, h].double(), torch.tensor(truth).double(), atol=2e-6, rtol=1e-5)


def test_heads_in_turns_give_the_same(monkeypatch):
    q, k = torch.randn(2, 4, 30, 8).transpose(0, 1).reshape(2, 4, 30, 8), torch.randn(2, 300, 2, 8).transpose(1, 2)
    call = Call.of(q, k)
    whole = kernels.column_and_offset_mass(q, k, call, 16)
    monkeypatch.setattr(kernels, "SCRATCH", 3 * 16 * 300)
    for one, other in zip(whole, kernels.column_and_offset_mass(q, k, call, 16), strict=True):
        assert torch.equal(one, other)


def test_a_row_that_sees_nothing_of_a_tile():
    # of 130 keys the last tile holds two, which only the last two rows see
    q, k = torch.randn(1, 1, 64, 4), torch.randn(1, 1, 130, 4)
    call = Call.of(q, k)
    for one, other in zip(
        kernels.column_and_offset_mass(q, k, call, 64), column_and_offset_mass(q, k, call, 64), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        assert abs(one.sum().item() - 64) < 1e-3


def test_large_logits_do_not_overflow():
    q, k = torch.full((1, 1, 5, 4), 100.0), torch.randn(1, 1, 40, 4) * 100
    call = Call.of(q, k)
    column, offset = kernels.column_and_offset_mass(q, k, call, 5)
    assert column.isfinite().all() and offset.isfinite().all() and abs(column.sum().item() - 5) < 1e-4


def touched(offsets, N, M, block):
    """Key blocks with a pair (i, j), i - j among the offsets, for whole query blocks from each first row on."""
    lists = []
    for a in range(0, N, block):
        m = M - N + a
        found = {(m + i - s) // block for s in offsets for i in (0, block - 1)}
        lists.append({b for b in found if 0 <= b * block < M})
    return lists


@settings(max_examples=16, deadline=None)
@given(st.integers(1, 150), st.integers(0, 150), st.sampled_from([7, 16, 64]), st.integers(1, 12))
def test_lists_hold_the_blocks_of_the_offsets(N, past, block, count):
    M, rng = N + past, torch.Generator().manual_seed(N * 13 + past)
    call = Call.of(torch.zeros(2, 2, N, 1), torch.zeros(2, 1, M, 1))
    offsets = torch.stack([torch.randperm(M, generator=rng)[:count] for _ in range(4)]).view(2, 2, -1)
    offsets[..., 0] = 0
    steps, top = vertical_slash._steps(offsets, call, block)
    short = diagonal_blocks(offsets, call, block).index
    # a GPU keeps as many places as the offsets could need
    for K in {steps.shape[2], min(steps.shape[2], 2 * offsets.shape[2])}:
        index = kernels.shifted(steps[..., :K], top, call, block)
        assert torch.equal(index, vertical_slash._shifted(steps[..., :K], top, call, block))
        assert torch.equal(index[..., : short.shape[3]], short) and (index[..., short.shape[3] :] == -1).all()
        for b in range(2):
            for h in range(2):
                want = touched(offsets[b, h].tolist(), N, M, block)
                for row, blocks in zip(index[b, h].tolist(), want, strict=True):
                    used = [j for j in row if j >= 0]
                    assert used == sorted(blocks)
                    assert row == used + [-1] * (len(row) - len(used))


def test_an_empty_place_among_the_offsets_is_none():
    call = Call.of(torch.zeros(1, 1, 128, 1), torch.zeros(1, 1, 128, 1))
    with_room = diagonal_blocks(torch.tensor([[[0, 64, -1]]]), call, 64).index
    assert torch.equal(with_room, diagonal_blocks(torch.tensor([[[0, 64]]]), call, 64).index)


def test_lists_stay_within_the_budget():
    # 20 offsets can touch 40 blocks, whatever the length
    call = Call.of(torch.zeros(1, 1, 8192, 1), torch.zeros(1, 1, 8192, 1))
    offsets = torch.cat((torch.zeros(1).long(), torch.randperm(8191)[:19] + 1)).view(1, 1, -1)
    assert diagonal_blocks(offsets, call, 64).index.shape[3] <= 40


def test_the_choice_is_sorted_and_ties_go_to_the_first():
    q = torch.zeros(1, 1, 300, 4)
    pattern = MInference(columns=40, diagonals=100, last=16, block=16).select(q, q, Call.of(q, q))
    # all keys weigh the same for a row; later keys are seen by fewer rows
    assert pattern.parts[1].index.flatten().tolist() == list(range(40))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_never_waits():
    q, k = torch.randn(1, 4, 5000, 64, device="cuda"), torch.randn(1, 2, 5000, 64, device="cuda")
    call = Call.of(q, k)
    MInference().select(q, k, call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        MInference().select(q, k, call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
