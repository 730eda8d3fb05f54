"""The tier against a dict of tensors: whatever is put away, selected and cropped comes back, within the budget."""

import ctypes
import gc
import os
import platform
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from saccade.cache import arena as arena_module
from saccade.cache import near as near_module
from saccade.cache.cap import Cap
from saccade.cache.far import Far, chosen, everything
from saccade.cache.near import Near
from saccade.cache.tier import ALL, Tier
from saccade.core.call import Call
from saccade.core.errors import DamagedError, FileError, InputError, SpaceError
from saccade.kernels import transfer

B, G, D, DV, BLOCK = 2, 3, 4, 2, 5
BYTES = BLOCK * (D + DV) * 4  # of a block, float32
PLACE = BYTES + 8  # of a block and its checksum on the device
MAPS = Path("/proc/self/maps")


def drawn(blocks, rows=B, dtype=torch.float32):
    n = blocks * BLOCK
    return torch.randn(rows, G, n, D).to(dtype), torch.randn(rows, G, n, DV).to(dtype)


def blocks_of(t, index):
    """Blocks index [B,G,n] of t [B,G,n*BLOCK,W], by hand; -1 is zeros."""
    out = torch.zeros(*index.shape, BLOCK, t.shape[3], dtype=t.dtype)
    for b in range(index.shape[0]):
        for g in range(index.shape[1]):
            for i, j in enumerate(index[b, g].tolist()):
                if j >= 0:
                    out[b, g, i] = t[b, g, j * BLOCK : (j + 1) * BLOCK]
    return out.flatten(2, 3)


def filled(blocks=6, places=B * G * 8, **fields):
    tier, (k, v) = Tier(BLOCK, places * PLACE, **fields), drawn(blocks)
    tier.append(k, v)
    return tier, k, v


def same(tier, k, v, index):
    got = tier.fetch(index)
    assert torch.equal(got[0], blocks_of(k, index)) and torch.equal(got[1], blocks_of(v, index))


class Machine(RuleBasedStateMachine):
    """Several tiers that came from one by `select`, each beside the tensors that it should hold."""

    folder = None

    @initialize(places=st.integers(1, 30), seed=st.integers(0, 99))
    def start(self, places, seed):
        torch.manual_seed(seed)
        self.budget = places * PLACE + PLACE // 2
        self.tiers = [(Tier(BLOCK, self.budget, self.folder), *drawn(0))]
        self.extend(0, 2)

    def pick(self, at):
        return self.tiers[at % len(self.tiers)]

    @rule(at=st.integers(0, 9), blocks=st.integers(1, 4))
    def extend(self, at, blocks):
        tier, k, v = self.pick(at)
        more = drawn(blocks, len(k))
        tier.append(*more)
        new = tier, torch.cat((k, more[0]), 2), torch.cat((v, more[1]), 2)
        self.tiers[at % len(self.tiers)] = new

    @rule(at=st.integers(0, 9), seed=st.integers(0, 999), ahead=st.booleans())
    def read(self, at, seed, ahead):
        tier, k, v = self.pick(at)
        places = self.budget // PLACE
        g = torch.Generator().manual_seed(seed)
        n = max(0, min(places // (len(k) * G), 4))
        if not tier.blocks or not n:
            return
        index = torch.randint(-1, tier.blocks, (len(k), G, n), generator=g)
        if ahead:
            tier.prefetch(torch.randint(-1, tier.blocks, (len(k), G, n), generator=g))
        same(tier, k, v, index)

    @rule(at=st.integers(0, 9), row=st.integers(0, 9), head=st.integers(0, 2), number=st.integers(0, 99))
    def read_one(self, at, row, head, number):
        tier, k, v = self.pick(at)
        if tier.blocks:
            row, number = row % len(k), number % tier.blocks
            got = tier.fetch(torch.tensor([[[number]]]), slice(row, row + 1), [head])
            assert torch.equal(got[0][0, 0], k[row, head, number * BLOCK : (number + 1) * BLOCK])
            assert torch.equal(got[1][0, 0], v[row, head, number * BLOCK : (number + 1) * BLOCK])

    @rule(at=st.integers(0, 9), seed=st.integers(0, 999))
    def read_rows(self, at, seed):
        tier, k, v = self.pick(at)
        if tier.blocks:
            index = torch.randint(0, tier.tokens, (len(k), G, 7), generator=torch.Generator().manual_seed(seed))
            for got, t in zip(tier.rows(index), (k, v), strict=True):
                assert torch.equal(got, t.gather(2, index[..., None].expand(-1, -1, -1, t.shape[3])))

    @rule(at=st.integers(0, 9), keep=st.integers(0, 9))
    def crop(self, at, keep):
        tier, k, v = self.pick(at)
        keep = min(keep, tier.blocks)
        tier.crop(keep)
        self.tiers[at % len(self.tiers)] = tier, k[:, :, : keep * BLOCK], v[:, :, : keep * BLOCK]

    @precondition(lambda self: len(self.tiers) < 4)
    @rule(at=st.integers(0, 9), rows=st.lists(st.integers(0, 9), min_size=1, max_size=4))
    def select(self, at, rows):
        tier, k, v = self.pick(at)
        index = torch.tensor(rows) % len(k)
        self.tiers.append((tier.select(index), k[index], v[index]))

    @precondition(lambda self: len(self.tiers) > 1)
    @rule(at=st.integers(0, 9), closed=st.booleans())
    def drop(self, at, closed):
        gone = self.tiers.pop(at % len(self.tiers))[0]
        if closed:
            gone.close()

    @invariant()
    def within_budget(self):
        for tier, k, _ in getattr(self, "tiers", []):
            assert tier.near_bytes() <= self.budget and tier.tokens == k.shape[2]
            if tier.near is not None:
                tier.near.settle()
                held = tier.near.holds[tier.near.holds >= 0]
                assert len(held) * PLACE <= self.budget and len(np.unique(held)) == len(held)
                assert np.array_equal(tier.near.place[held], np.flatnonzero(tier.near.holds >= 0))

    @invariant()
    def owners_are_counted(self):
        if getattr(self, "tiers", None) and (arena := self.tiers[0][0].arena) is not None:
            want = torch.zeros_like(arena.owners)
            for tier, _, _ in self.tiers:
                for slot in tier.table.flatten().tolist():
                    want[slot] += 1
            assert torch.equal(arena.owners, want) and sorted(arena.free) == (want == 0).nonzero().flatten().tolist()


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestTier = Machine.TestCase


@given(asked=st.lists(st.integers(0, 7), min_size=5, max_size=40), places=st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_the_least_recently_used_gives_way(asked, places):
    tier = Tier(BLOCK, places * PLACE)
    tier.append(torch.randn(1, 1, 8 * BLOCK, D), torch.randn(1, 1, 8 * BLOCK, DV))
    held, hits = OrderedDict(), 0
    for number in asked:
        tier.fetch(torch.tensor([[[number]]]))
        hits += number in held
        held[number] = True
        held.move_to_end(number)
        if len(held) > places:
            held.popitem(last=False)
    counters = tier.counters
    assert (counters.hits, counters.misses) == (hits, len(asked) - hits)
    assert counters.moved == counters.misses * BYTES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_type_in_a_file(tmp_path, dtype):
    tier, (k, v) = Tier(BLOCK, 1 << 20, str(tmp_path)), drawn(9, dtype=dtype)
    for at in range(0, 9, 3):
        piece = slice(at * BLOCK, (at + 3) * BLOCK)
        tier.append(k[:, :, piece], v[:, :, piece])
    same(tier, k, v, torch.randint(-1, 9, (B, G, 6)))
    assert torch.equal(tier.keys(3, 31), k[:, :, 3:31])


def test_another_layers_block_is_caught():
    (one, k, v), (two, _, _) = filled(), filled()
    index = torch.arange(3).expand(B, G, 3)
    same(one, k, v, index)
    one.near.forget(one.table.flatten().numpy())
    one.arena.slabs[0][1] = two.arena.slabs[0][1]
    with pytest.raises(DamagedError, match="another layer's"):
        one.fetch(index)
    one.arena.slabs[0][1] = torch.cat((k, v), -1)[0, 0, BLOCK : 2 * BLOCK]
    same(one, k, v, index)  # what was damaged did not stay in the cache


@pytest.mark.parametrize("fault", ["one bit", "rows swapped", "blocks swapped"])
def test_a_block_written_over_is_caught(fault):
    tier, k, v = filled()
    slab, slot = tier.arena.slabs[0], int(tier.table[1, 2, 3])
    if fault == "one bit":
        slab.view(torch.int32)[slot, 2, 3] ^= 1
    elif fault == "rows swapped":
        slab[slot] = slab[slot].roll(1, 0)
    else:
        slab[[slot, slot + 1]] = slab[[slot + 1, slot]]
    same(tier, k, v, torch.zeros(B, G, 1, dtype=torch.long))
    with pytest.raises(DamagedError):
        tier.fetch(torch.full((B, G, 1), 3))


def test_a_stale_block_in_the_cache_is_caught(monkeypatch):
    tier, k, v = filled(places=100)
    same(tier, k, v, torch.full((B, G, 1), 5))
    # the fault: numbers are used again, and the cache is not told
    monkeypatch.setattr(Near, "forget", lambda self, slots: None)
    tier.crop(5)
    tier.append(*drawn(1))
    with pytest.raises(DamagedError):
        tier.fetch(torch.full((B, G, 1), 5))


def test_numbers_of_a_collected_tier_are_used_again():
    tier, k, v = filled(places=100)
    other = tier.select(torch.tensor([0, 1]))
    more = drawn(2)
    other.append(*more)
    other.fetch(torch.tensor([6, 7]).expand(B, G, 2))  # now they are in the cache that both share
    freed = set(other.table[:, :, 6:].flatten().tolist())
    del other
    gc.collect()
    more = drawn(2)
    tier.append(*more)
    assert freed & set(tier.table[:, :, 6:].flatten().tolist())
    same(tier, torch.cat((k, more[0]), 2), torch.cat((v, more[1]), 2), torch.tensor([7, 6, 0]).expand(B, G, 3))


def test_a_budget_below_one_block_is_refused_before_anything():
    tier = Tier(BLOCK, PLACE - 1, name="offload, layer 3")
    with pytest.raises(InputError, match=f"offload, layer 3.*{PLACE - 1} bytes .* does not hold one block of {PLACE}"):
        tier.append(*drawn(1))
    assert tier.bytes() == 0
    exact = Tier(BLOCK, PLACE)
    k, v = drawn(2)
    exact.append(k, v)
    with pytest.raises(InputError, match="holds 1"):
        exact.fetch(torch.zeros(B, G, 1, dtype=torch.long))
    got = exact.fetch(torch.tensor([[[1]]]), slice(1, 2), [2])
    assert torch.equal(got[0][0, 0], k[1, 2, BLOCK:])


def test_no_space_loses_nothing(monkeypatch, tmp_path):
    limited, k, v = filled(4, limit=B * G * 6 * BYTES)
    for more in (3, 9):
        with pytest.raises(SpaceError, match=r"do not fit.*raise the limit"):
            limited.append(*drawn(more))
        same(limited, k, v, torch.arange(4).expand(B, G, 4))
    more = drawn(2)
    limited.append(*more)
    assert limited.far_bytes() <= B * G * 6 * BYTES
    same(limited, torch.cat((k, more[0]), 2), torch.cat((v, more[1]), 2), torch.arange(6).expand(B, G, 6))
    with pytest.raises(SpaceError, match="one block"):
        Tier(BLOCK, 1 << 20, limit=BYTES).append(*drawn(1))

    tier, k, v = filled(4, folder=str(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(arena_module.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(SpaceError, match="100 are free"):
        tier.append(*drawn(9))
    monkeypatch.undo()

    def full(handle, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arena_module.os, "posix_fallocate", full)
    with pytest.raises(FileError, match="No space left"):
        tier.append(*drawn(9))
    monkeypatch.undo()
    same(tier, k, v, torch.arange(4).expand(B, G, 4))
    monkeypatch.setattr(arena_module, "_available", lambda: 1000)
    with pytest.raises(SpaceError, match="1000 are free; name a folder"):
        filled(20)
    assert os.listdir(tmp_path) == []


def test_a_read_that_fails_is_told_and_can_be_made_again(monkeypatch):
    tier, k, v = filled()
    index = torch.arange(4).expand(B, G, 4)

    def broken(slots, out=None):
        raise OSError("the disk is gone")

    monkeypatch.setattr(tier.arena, "read", broken)
    tier.prefetch(index)
    with pytest.raises(OSError, match="the disk is gone"):
        tier.fetch(index)
    monkeypatch.undo()
    same(tier, k, v, index)


@pytest.mark.parametrize("swept", [1, 3000, 1 << 22])
def test_a_sweep_takes_no_more_at_a_time_than_a_processors_cache_holds(monkeypatch, swept):
    monkeypatch.setattr(near_module, "SWEPT", swept)
    tier = Tier(block=4, budget=1 << 20)
    k, v = torch.randn(2, 3, 80, 6), torch.randn(2, 3, 80, 6)
    tier.append(k, v)
    index = torch.stack([torch.randperm(20) for _ in range(6)]).view(2, 3, 20)
    got_k, got_v = torch.zeros_like(k), torch.zeros_like(v)
    for rows, heads, part, keys, values in tier.sweep(index):
        tokens = slice(part.start * 4, part.stop * 4)
        assert keys.shape[0] * keys.shape[1] * keys.shape[2] // 4 <= max(1, swept // (4 * 12 * 4))
        got_k[rows, heads, tokens], got_v[rows, heads, tokens] = keys, values
    at = (index[..., None] * 4 + torch.arange(4)).flatten(2)[..., None].expand(-1, -1, -1, 6)
    assert torch.equal(got_k, k.gather(2, at)) and torch.equal(got_v, v.gather(2, at))


@pytest.mark.skipif(not MAPS.exists(), reason="maps of files are looked up in /proc")
def test_files_go_when_the_tier_goes(tmp_path):
    def mapped():
        return MAPS.read_text().count(str(tmp_path))

    tier, k, v = filled(folder=str(tmp_path))
    other = tier.select(torch.tensor([1]))
    assert mapped() and os.listdir(tmp_path) == []  # a killed process leaves nothing behind
    tier.close()
    same(other, k[1:], v[1:], torch.arange(6).expand(1, G, 6))
    del other
    gc.collect()
    assert not mapped()
    tier = filled(folder=str(tmp_path))[0]
    assert mapped()
    del tier
    gc.collect()
    assert not mapped()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is looked up in /proc, and trimmed by glibc")
def test_a_file_is_not_memory(tmp_path):
    def anonymous():
        # what is freed goes back to the system
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    tier, piece = Tier(64, 1 << 20, str(tmp_path)), torch.randn(1, 2, 4096, 64)
    tier.append(piece, piece)
    before = anonymous()
    for _ in range(24):
        tier.append(piece, piece)
    assert tier.far_bytes() > 100e6 and anonymous() - before < 20e6
    q = torch.randn(1, 2, 1, 64)
    far = Far((0, 1), 1, 0, tier)
    everything(q, far, Call.of(q, q))
    assert anonymous() - before < 30e6 and tier.near_bytes() <= 1 << 20


@pytest.mark.parametrize("places", [1, 2, 5, 13, 200])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_attention_to_all_of_it_in_pieces(places, n):
    tier = Tier(BLOCK, places * (BLOCK * (D + DV) * 8 + 8))
    k, v = drawn(7, dtype=torch.float64)
    tier.append(k, v)
    q = torch.randn(B, 2 * G, n, D, dtype=torch.float64)
    far = Far(tuple(range(2 * G)), 2, 9, tier)
    out = everything(q, far, Call.of(q, q[:, :G], q_pos=torch.arange(n)[None], scale=0.7))
    scores = 0.7 * q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    torch.testing.assert_close(out.o, scores.softmax(-1) @ v.repeat_interleave(2, 1))
    torch.testing.assert_close(out.lse, scores.logsumexp(-1))
    # some heads of the call, and not in order
    heads = (4, 1, 0)
    sub = Call.of(q[:, heads], k[:, [2, 0, 0]], heads=heads, q_pos=torch.arange(n)[None], scale=0.7)
    torch.testing.assert_close(everything(q[:, heads], far, sub).o, out.o[:, heads])
    index = torch.tensor([[5, 2], [0, 6], [3, 4]]).expand(B, G, 2)
    got = chosen(q, index, far, Call.of(q, q[:, :G], q_pos=torch.arange(n)[None], scale=0.7))
    keys, values = (blocks_of(t, index).repeat_interleave(2, 1) for t in (k, v))
    torch.testing.assert_close(got.o, (0.7 * q @ keys.transpose(-1, -2)).softmax(-1) @ values)


def test_bad_input():
    with pytest.raises(InputError, match="block and budget must be >= 1"):
        Tier(0, 100)
    with pytest.raises(InputError, match="is no folder"):
        Tier(4, 100, "/no/such/folder")
    with pytest.raises(InputError, match="nothing was put away"):
        Tier(4, 100).fetch(torch.zeros(1, 1, 1))
    tier, k, v = filled()
    for bad in (drawn(1)[0][:, :, 1:], drawn(1)[0].double(), drawn(1)[0][:1], drawn(1)[0][..., 1:]):
        with pytest.raises(InputError):
            tier.append(bad, drawn(1)[1][: len(bad), :, : bad.shape[2]])
    for bad in (-2, 6):
        with pytest.raises(InputError, match="6 are here"):
            tier.fetch(torch.full((B, G, 1), bad))
    with pytest.raises(InputError, match="30 are here"):
        tier.rows(torch.full((B, G, 1), 30))
    with pytest.raises(InputError, match="cannot keep 7"):
        tier.crop(7)
    same(tier, k, v, torch.arange(6).expand(B, G, 6))


@given(st.data())
@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
def test_the_budget_is_never_exceeded(data):
    """Whatever is asked for, before and after: bytes on the device stay within the budget."""
    budget = data.draw(st.integers(1, 40 * PLACE))
    tier = Tier(BLOCK, budget)
    if budget < PLACE:
        with pytest.raises(InputError):
            tier.append(*drawn(1))
        assert tier.near_bytes() == 0
        return
    tier.append(*drawn(5))
    for _ in range(data.draw(st.integers(1, 6))):
        index = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=8))).expand(B, G, -1)
        distinct = B * G * len(set(index[0, 0].tolist()))
        for act in (tier.prefetch, tier.fetch):
            if distinct > budget // PLACE:
                with pytest.raises(InputError, match="the cache holds"):
                    act(index)
            else:
                act(index)
            assert tier.near_bytes() <= budget


class Shared(RuleBasedStateMachine):
    """Tiers of several layers, of other block sizes and types too, under one cap: counted, and compared with truth."""

    @initialize(places=st.integers(4, 60), seed=st.integers(0, 99))
    def start(self, places, seed):
        torch.manual_seed(seed)
        self.cap, self.budget, self.layers = Cap(), places * PLACE, []

    @precondition(lambda self: len(self.layers) < 5)
    @rule(block=st.sampled_from([2, BLOCK]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def layer(self, block, dtype):
        tier = Tier(block, self.budget, cap=self.cap, name=f"layer {len(self.layers)}")
        k, v = (t.to(dtype) for t in (torch.randn(1, G, 2 * block, D), torch.randn(1, G, 2 * block, DV)))
        largest = max([block * (D + DV) * dtype.itemsize + 8, *(t.near.least for t, _, _ in self.layers)])
        before = self.cap.held()
        if largest > self.budget // (len(self.layers) + 1):
            with pytest.raises(InputError, match="together"):
                tier.append(k, v)
            assert self.cap.held() == before and tier.bytes() == 0
        else:
            tier.append(k, v)
            self.layers.append((tier, k, v))

    @precondition(lambda self: self.layers)
    @rule(at=st.integers(0, 9), blocks=st.integers(1, 9))
    def extend(self, at, blocks):
        tier, k, v = self.layers[at % len(self.layers)]
        n = blocks * tier.block
        more = torch.randn(1, G, n, D).to(k.dtype), torch.randn(1, G, n, DV).to(k.dtype)
        tier.append(*more)
        self.layers[at % len(self.layers)] = tier, torch.cat((k, more[0]), 2), torch.cat((v, more[1]), 2)

    @precondition(lambda self: self.layers)
    @rule(at=st.integers(0, 9), seed=st.integers(0, 999), how=st.sampled_from(["fetch", "prefetch", "place", "sweep"]))
    def read(self, at, seed, how):
        tier, k, v = self.layers[at % len(self.layers)]
        n = 5 if how == "sweep" else min(tier.places // G, 4)
        if not n:
            return
        index = torch.randint(0, tier.blocks, (1, G, n), generator=torch.Generator().manual_seed(seed))
        want = [
            t.unflatten(2, (-1, tier.block))[torch.zeros(1, 1, 1).long(), torch.arange(G)[:, None], index]
            for t in (k, v)
        ]
        if how == "prefetch":
            tier.prefetch(index)
        elif how == "fetch":
            got = tier.fetch(index)
            assert all(torch.equal(a, b.flatten(2, 3)) for a, b in zip(got, want, strict=True))
        elif how == "place":
            keys, values, where = tier.place(index)
            for t, b in ((keys, want[0]), (values, want[1])):
                blocks = t.unflatten(2, (-1, tier.block))[0, 0]
                order = torch.sort(torch.from_numpy(tier.near.place[tier._numbers(index, ALL, None)[0]]), -1).indices
                assert torch.equal(blocks[where[0].long()], b[0][torch.arange(G)[:, None], order[0]])
        else:
            for _, heads, part, keys, values in tier.sweep(index):
                for t, b in ((keys, want[0]), (values, want[1])):
                    assert torch.equal(t, b[:, heads, part].flatten(2, 3))
                assert self.cap.held() <= self.budget

    @precondition(lambda self: len(self.layers) > 1)
    @rule(at=st.integers(0, 9))
    def leave(self, at):
        self.layers.pop(at % len(self.layers))

    @invariant()
    def together_within_the_budget(self):
        if getattr(self, "layers", None):
            # what is there, tensor by tensor, and what the cap says
            held = sum(
                t.near.data.untyped_storage().nbytes() + t.near.sums.untyped_storage().nbytes()
                for t, _, _ in self.layers
            )
            # one that has left may live on in its thread for a moment, and is counted as long
            assert held <= self.cap.held() <= self.budget
            assert held == sum(tier.near_bytes() for tier, _, _ in self.layers)


Shared.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestShared = Shared.TestCase


def test_what_was_held_is_given_back_before_another_layer_takes_any():
    cap, budget = Cap(), 12 * PLACE
    one = Tier(BLOCK, budget, cap=cap)
    k, v = drawn(6)
    one.append(k[:1, :2], v[:1, :2])
    one.fetch(torch.arange(6).expand(1, 2, 6))
    assert one.near_bytes() == budget
    two = Tier(BLOCK, budget, cap=cap)
    two.append(k[:1, :2], v[:1, :2])
    assert one.near_bytes() == 0 and cap.share == budget // 2
    for tier in (one, two, one):
        got = tier.fetch(torch.tensor([[[5, 1, 0], [2, 2, 4]]]))
        assert torch.equal(got[0], blocks_of(k[:1, :2], torch.tensor([[[5, 1, 0], [2, 2, 4]]])))
    assert one.near_bytes() == two.near_bytes() == budget // 2
    del two
    gc.collect()
    one.fetch(torch.arange(6).expand(1, 2, 6))  # alone again, it may have all
    assert one.near_bytes() == budget


def test_single_tokens_and_keys_are_checked_too():
    """Another layer's rows, a block written over as a whole, and a table that names another block."""
    index = torch.arange(30).expand(B, G, 30)
    (one, k, _), (two, _, _) = filled(), filled()
    slot = int(one.table[1, 2, 3])
    for fault in ("row", "block", "table"):
        kept = one.arena.slabs[0][slot].clone(), one.table.clone()
        if fault == "row":
            one.arena.slabs[0][slot, 2] = two.arena.slabs[0][slot, 2]
        elif fault == "block":
            # written by the book, but by someone else
            rows = two.arena.slabs[0][slot : slot + 1].clone()
            at = torch.tensor([slot])
            sums, marks = transfer.sums(rows), transfer.marks(rows.flatten(0, 1)).view(1, -1)
            one.arena.write(at, rows, sums, marks)
        else:
            one.table[1, 2, 3] = one.table[0, 0, 0]
        with pytest.raises(DamagedError, match="another layer's"):
            one.rows(index)
        with pytest.raises(DamagedError, match="another layer's"):
            one.keys()
        good = index.clone()
        good[1, 2, 15:20] = 0  # who does not read it is not disturbed
        assert torch.equal(one.rows(good)[0], k.gather(2, good[..., None].expand(-1, -1, -1, D)))
        rows, one.table = kept[0][None], kept[1]
        one.arena.write(torch.tensor([slot]), rows, transfer.sums(rows), transfer.marks(rows[0]).view(1, -1))
        assert torch.equal(one.keys(), k)


def test_a_sweep_that_finds_damage_says_so():
    tier, k, v = filled(places=4)
    index = torch.arange(6).expand(B, G, 6)
    got = torch.zeros_like(k)
    for rows, heads, part, keys, _ in tier.sweep(index):
        got[rows, heads, part.start * BLOCK : part.stop * BLOCK] = keys
    assert torch.equal(got, k)
    tier.arena.slabs[0][int(tier.table[0, 1, 5])] += 1
    with pytest.raises(DamagedError):
        list(tier.sweep(index))
    with pytest.raises(InputError, match="none of them missing"):
        next(tier.sweep(torch.full((B, G, 1), -1)))


def test_room_that_is_reserved_is_there(monkeypatch):
    tier, (k, v) = Tier(BLOCK, 1 << 12), drawn(9)
    tier.reserve(k, v, 9 * BLOCK)
    held = tier.far_bytes()
    assert held >= B * G * 9 * BYTES and tier.tokens == 0
    monkeypatch.setattr(arena_module, "_available", lambda: 0)
    for at in range(9):
        tier.append(*(t[:, :, at * BLOCK : (at + 1) * BLOCK] for t in (k, v)))
    assert tier.far_bytes() == held
    with pytest.raises(SpaceError, match="0 are free"):
        tier.reserve(k, v, 99 * BLOCK)
    same(tier, k, v, torch.arange(1).expand(B, G, 1))


def test_what_a_sweep_overwrote_is_not_found_in_the_cache():
    tier, k, v = filled(places=B * G * 6)
    index = torch.arange(6).expand(B, G, 6)
    same(tier, k, v, index)
    assert tier.counters.misses == B * G * 6
    pieces = [piece.k.clone() for piece in tier.sweep(index.flip(-1))]
    assert len(pieces) > 1 and tier.counters.swept == B * G * 6 * BYTES
    same(tier, k, v, index)
    assert tier.counters.misses == 2 * B * G * 6 and tier.counters.hits == 0


LARGER = """
import resource, sys
import torch
from saccade.cache.far import Far, everything
from saccade.cache.tier import Tier
from saccade.core.call import Call
from saccade.core.errors import SpaceError

folder = sys.argv[1] or None
torch.set_num_threads(1)
pieces, n, D = 24, 8192, 64


def piece(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(1, 2, n, D, generator=g), torch.randn(1, 2, n, D, generator=g)


q = torch.randn(1, 2, 1, D, generator=torch.Generator().manual_seed(99))
# warm up before the limit: threads, kernels
warm = Tier(64, 1 << 20)
warm.append(*(t[:, :, :640] for t in piece(0)))
everything(q, Far((0, 1), 1, 0, warm), Call.of(q, q))
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + (96 << 20), resource.RLIM_INFINITY))
tier = Tier(64, 4 << 20, folder)
try:
    for i in range(pieces):
        tier.append(*piece(i))
except (SpaceError, RuntimeError, MemoryError) as error:
    print("no room", type(error).__name__, tier.tokens)
    sys.exit()
out = everything(q, Far((0, 1), 1, 0, tier), Call.of(q, q))
# what the tier was read in is measured; the loop that checks it may take what it needs
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
top, total, sum_ = None, 0.0, 0.0
for i in range(pieces):
    k, v = (t.double() for t in piece(i))
    scores = (q.double() @ k.transpose(-1, -2)) / D**0.5
    part = scores.logsumexp(-1)
    o = scores.softmax(-1) @ v
    both = part if top is None else torch.logaddexp(top, part)
    sum_ = o if top is None else sum_ * (top - both).exp()[..., None] + o * (part - both).exp()[..., None]
    top = both
print("error", float((out.o - sum_).abs().max()), tier.tokens, tier.far_bytes(), tier.near_bytes())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's own memory is Linux's")
def test_a_context_larger_than_memory_is_read_from_a_file(tmp_path):
    """201 MB of keys and values where a process may have 100 MB more: from a file it is read, in memory it fails."""

    def run(folder):
        got = subprocess.run([sys.executable, "-c", LARGER, folder], capture_output=True, text=True, timeout=120)
        assert got.returncode == 0, got.stderr
        return got.stdout.split()

    what, error, tokens, far, near = run(str(tmp_path))
    assert what == "error" and float(error) < 1e-5
    assert int(tokens) == 24 * 8192 and int(far) >= 200e6 and int(near) <= 4 << 20
    assert run("")[:2] == ["no", "room"]
