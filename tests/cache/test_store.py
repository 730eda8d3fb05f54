"""The store against lists of lists: any sequence of appends, crops, selections, evictions and resets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from saccade.cache.group import ROOM, Fold, Group, View
from saccade.cache.store import DRAFT, Store, call_for
from saccade.core.errors import InputError
from saccade.methods.policy.duo import DuoAttention

HEADS, D, DV = 3, 2, 1


class NoFold:
    """Drops what it drops."""

    def fold(self, k, v, bias, slots, call):
        return None


class Ends(NoFold):
    """Keeps the first `sink` and the last `recent` slots: exact under a crop of `spare` tokens."""

    def __init__(self, sink, recent, spare=DRAFT):
        self.sink, self.recent, self.spare = sink, recent, spare

    def keep(self, q, k, v, call):
        M, recent = k.shape[2], self.recent + self.spare
        if self.sink + recent >= M:
            return None
        return torch.cat((torch.arange(self.sink), torch.arange(M - recent, M)))[None, None]


class EveryOther(NoFold):
    """Each head keeps other slots, equally many: even slots in head 0, odd ones elsewhere, and the last token."""

    def keep(self, q, k, v, call):
        M = k.shape[2]
        if M < 6:
            return None
        lines = [torch.cat((torch.arange(h, M - 2 + h, 2)[: (M - 1) // 2], torch.tensor([M - 1]))) for h in (0, 1)]
        return torch.stack([lines[min(h, 1)] for h in range(k.shape[1])])[None]


def tokens(serials, B, n):
    """Keys and values that say which token they are: head and row and serial number in one number."""
    base = torch.tensor(serials, dtype=torch.float64).view(B, 1, n, 1)
    head = torch.arange(HEADS, dtype=torch.float64).view(1, HEADS, 1, 1) / 8
    key = base + head
    return torch.cat((key, key + 0.5), -1), -key


class Machine(RuleBasedStateMachine):
    """`rows` is the naive model: for each batch row its real tokens (serial numbers), and what was padding."""

    policies = ()

    @initialize(B=st.integers(1, 3))
    def start(self, B):
        self.store = Store(self.policies, kv_heads=HEADS)
        self.B, self.serial = B, 1
        self.restart()

    def restart(self):
        self.rows = [[] for _ in range(self.B)]
        self.real = [[] for _ in range(self.B)]
        self.evicted = [0] * self.B

    @rule(n=st.integers(1, 5), big=st.booleans(), pad=st.booleans(), now=st.booleans(), data=st.data())
    def append(self, n, big, pad, now, data):
        n = n * 30 if big else n
        valid = torch.ones(self.B, n, dtype=torch.bool)
        if pad:
            for row in range(self.B):
                edge = data.draw(st.integers(0, n - 1 if not self.rows[row] else n))
                if data.draw(st.booleans()):
                    valid[row, :edge] = False
                else:
                    valid[row, n - edge :] = False
        serials = [[self.serial + row * n + i for i in range(n)] for row in range(self.B)]
        self.serial += self.B * n
        self.note_evictions()
        self.store.append(*tokens(serials, self.B, n), valid if pad or data.draw(st.booleans()) else None)
        for row in range(self.B):
            self.real[row] += valid[row].tolist()
            self.rows[row] += [s for s, real in zip(serials[row], valid[row].tolist(), strict=True) if real]
        asked = [
            torch.zeros(rows.stop - rows.start, 2 * HEADS, int(valid[rows.start].sum()), D).double()
            for rows in self.store.row_sets()
        ]
        self.store.asked(asked, now)
        if now:
            self.note_evictions()

    def note_evictions(self):
        """From here on a crop may not go far below."""
        if any(isinstance(policy, Ends) for _, policy in self.policies):
            self.evicted = [max(cut, len(row)) for cut, row in zip(self.evicted, self.rows, strict=True)]

    @precondition(lambda self: min(map(len, self.rows)) > 1)
    @rule(count=st.integers(1, 8))
    def crop(self, count):
        left = [real[:-count] for real in self.real]
        after = [sum(real) for real in left]
        if any(n == 0 or n < cut - DRAFT for n, cut in zip(after, self.evicted, strict=True)):
            return
        self.store.crop(count)
        self.real = left
        self.rows = [row[: sum(real)] for row, real in zip(self.rows, left, strict=True)]

    @precondition(lambda self: self.rows[0])
    @rule(data=st.data())
    def select(self, data):
        index = data.draw(st.lists(st.integers(0, self.B - 1), min_size=1, max_size=4))
        self.store.select(torch.tensor(index))
        self.rows, self.real = ([list(t[i]) for i in index] for t in (self.rows, self.real))
        self.evicted = [self.evicted[i] for i in index]
        self.B = len(index)

    @rule(original=st.booleans(), n=st.sampled_from((1, 3, 90)))
    def fork(self, original, n):
        """One of two forks goes on; what is done to the other changes nothing in it."""
        twin = self.store.fork()
        if not original:
            self.store, twin = twin, self.store
        if twin.seen:
            twin.append(*tokens([[-1] * n] * self.B, self.B, n))
            twin.asked([torch.zeros(r.stop - r.start, 2 * HEADS, n, D).double() for r in twin.row_sets()], True)
            for group in twin.groups:
                group.k.fill_(-1), group.v.fill_(-1)
            for held in twin.memory:
                held["mine"] = True
        twin.reset()
        assert not any("mine" in held for held in self.store.memory)

    @rule()
    def reset(self):
        self.store.reset()
        self.restart()
        assert self.store.bytes() == 0

    @invariant()
    def holds_what_it_should(self):
        if not hasattr(self, "store") or not self.rows[0]:
            return
        assert self.store.seen == [len(row) for row in self.rows]
        assert self.store.total == len(self.real[0])
        covered = []
        for rows in self.store.row_sets():
            covered += range(rows.start, rows.stop)
            for view in self.store.views(rows):
                for at, row in enumerate(range(rows.start, rows.stop)):
                    for g, head in enumerate(view.heads):
                        self.compare(view, at, g, head, self.rows[row])
        assert covered == list(range(self.B))
        assert self.store.bytes() == sum(g.bytes() for g in self.store.groups)

    def compare(self, view, at, g, head, row):
        keys, values = view.k[at, g], view.v[at, g]
        M = len(keys)
        held = range(M) if view.pos is None else view.pos[at, g].tolist()
        want = torch.tensor([row[p] for p in held], dtype=torch.float64) + head / 8
        assert torch.equal(keys, torch.stack((want, want + 0.5), -1))
        assert torch.equal(values[:, 0], -want)
        assert list(held) == sorted(held)
        if view.policy is None:
            assert list(held) == list(range(len(row)))
        else:
            # a crop of what was evicted leaves fewer, and the next queries must still find these
            policy = view.policy
            needed = {*range(min(policy.sink, len(row))), *range(max(0, len(row) - policy.recent), len(row))}
            assert needed <= set(held)


class Plain(Machine):
    """No policy: everything is kept."""


class Evicting(Machine):
    """Two policies beside a head that keeps everything; heads are not in order."""

    policies = (((2,), Ends(2, 5)), ((0,), Ends(0, 3)))


class EvictingAll(Machine):
    """One policy for all heads, named in no order."""

    policies = (((2, 0, 1), Ends(1, 9)),)


for machine in (Plain, Evicting, EvictingAll):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestPlain, TestEvicting, TestEvictingAll = Plain.TestCase, Evicting.TestCase, EvictingAll.TestCase


def filled(store, n, B=1, now=True, valid=None):
    serials = [list(range(n)) for _ in range(B)]
    store.append(*tokens(serials, B, n), valid)
    store.asked([torch.zeros(rows.stop - rows.start, 2 * HEADS, n, D).double() for rows in store.row_sets()], now)
    return store


def test_bytes_are_really_freed():
    slot = (D + DV) * 8
    dense = filled(Store([], HEADS), 5000).bytes()
    assert dense <= (5000 + ROOM) * HEADS * slot
    store = filled(Store([((0, 1), Ends(4, 12))], HEADS), 5000)
    assert store.bytes() <= (5000 + ROOM) * slot + 2 * (32 + ROOM) * (slot + 4)
    group = next(g for g in store.groups if g.policy is not None)
    for t in (group.k, group.v, group.pos):
        # not a view of what was there before
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


def test_appending_is_in_place():
    store = filled(Store([], HEADS), 10)
    where = store.groups[0].k.data_ptr()
    for _ in range(ROOM):
        store.append(*tokens([[0]], 1, 1))
    assert store.groups[0].k.data_ptr() == where
    store.append(*tokens([[0]], 1, 1))
    assert store.groups[0].k.data_ptr() != where


def test_room_grows_by_an_eighth():
    store = filled(Store([], HEADS), 8000)
    store.append(*tokens([[0] * 100], 1, 100))
    assert store.groups[0].k.shape[2] <= 8100 * 9 // 8 + ROOM


def test_eviction_after_a_short_call_waits_for_the_next():
    store = filled(Store([((0, 1, 2), Ends(1, 3, spare=0))], HEADS), 20)
    assert store.views()[0].pos[0, 0].tolist() == [0, 17, 18, 19]
    filled(store, 3, now=False)
    assert store.views()[0].pos[0, 0].tolist() == [0, 17, 18, 19, 20, 21, 22]
    store.crop(2)
    assert store.views()[0].pos[0, 0].tolist() == [0, 17, 18, 19, 20]
    store.settle()
    assert store.views()[0].pos[0, 0].tolist() == [0, 18, 19, 20]


def test_the_policy_is_asked_with_the_queries_that_are_left():
    class Asked:
        def keep(self, q, k, v, call):
            asked.append((q.shape, k.shape, call.positions()[0].tolist(), call.heads))

    asked = []
    store = filled(Store([((1,), Asked())], HEADS), 4)
    filled(store, 3, now=False)
    store.crop(1)
    store.settle()
    assert asked == [
        ((1, 2, 4, D), (1, 1, 4, D), [[0, 1, 2, 3]], (2, 3)),
        ((1, 2, 2, D), (1, 1, 6, D), [[4, 5]], (2, 3)),
    ]


def test_a_draft_that_is_taken_back_whole_leaves_nothing_to_ask():
    store = filled(Store([((0, 1, 2), Ends(1, 3, spare=0))], HEADS), 10)
    filled(store, 3, now=False)
    store.crop(3)
    store.settle()
    assert store.views()[0].pos[0, 0].tolist() == [0, 7, 8, 9]


def test_heads_of_a_group_may_keep_different_slots():
    store = filled(Store([((0, 2), EveryOther())], HEADS), 9)
    view = store.views()[1]
    assert view.heads == (0, 2)
    assert view.pos[0].tolist() == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 8]]
    assert view.k[0, 1, :, 0].tolist() == [1.25, 3.25, 5.25, 7.25, 8.25]
    store.crop(1)
    assert store.views()[1].pos[0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(InputError, match="disagree"):
        store.crop(1)


def test_a_crop_that_goes_below_an_eviction_is_refused_before_anything_is_lost():
    store = filled(Store([((0,), Ends(1, 3))], HEADS), 100)
    with pytest.raises(InputError, match=r"back to 83 tokens, but tokens were evicted when there were 100; at most 16"):
        store.crop(DRAFT + 1)
    assert store.seen == [100]
    store.crop(DRAFT)
    assert store.seen == [84] and store.views()[1].pos[0, 0, -3:].tolist() == [81, 82, 83]
    with pytest.raises(InputError, match="evicted"):
        store.crop(1)


def test_rows_of_different_length():
    valid = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    store = filled(Store([], HEADS), 4, B=2, valid=valid)
    assert store.seen == [2, 4] and store.total == 4
    assert store.row_sets() == [slice(0, 1), slice(1, 2)]
    assert store.views(slice(0, 1))[0].k[0, 0, :, 0].tolist() == [2, 3]
    assert store.memory_of(slice(0, 1)) is not store.memory_of(slice(1, 2))


def test_rows_padded_in_different_places_are_told_apart():
    valid = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]).bool()
    store = filled(Store([], HEADS), 4, B=2, valid=valid)
    assert store.seen == [2, 2]
    assert store.row_sets() == [slice(0, 1), slice(1, 2)]
    assert [store.views(rows)[0].k[0, 0, :, 0].tolist() for rows in store.row_sets()] == [[2, 3], [0, 1]]


def test_rows_padded_alike_stay_together():
    valid = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]]).bool()
    store = filled(Store([], HEADS), 4, B=2, valid=valid)
    assert store.row_sets() == [slice(0, 2)]
    assert store.views()[0].k.shape[2] == 3


def test_memory_goes_with_its_row():
    store = filled(Store([], HEADS), 2, B=2)
    store.memory_of(slice(0, 2)).update(a=torch.tensor([[1.0], [2.0]]), deep={"b": torch.tensor([3, 4])}, c="same")
    store.select(torch.tensor([1, 1, 0]))
    memory = store.memory_of(store.row_sets()[0])
    assert memory["a"].flatten().tolist() == [2, 2, 1] and memory["deep"]["b"].tolist() == [4, 4, 3]
    assert memory["c"] == "same"
    store.append(*tokens([[5], [5], [5]], 3, 1), torch.tensor([[True], [False], [True]]))
    assert [store.memory_of(rows)["a"].flatten().tolist() for rows in store.row_sets()] == [[2], [2], [1]]
    store.select(torch.tensor([2, 0]))
    assert [store.memory_of(rows)["a"].flatten().tolist() for rows in store.row_sets()] == [[1], [2]]


def test_a_fork_has_a_memory_of_its_own():
    for valid in (None, torch.tensor([[0, 1], [1, 1]]).bool()):
        store = filled(Store([], HEADS), 2, B=2, valid=valid)
        for rows in store.row_sets():
            count = rows.stop - rows.start
            store.memory_of(rows).update(a=torch.zeros(count, 1), deep={"b": torch.zeros(count), "slots": 1})
        twin = store.fork()
        for rows in twin.row_sets():
            held = twin.memory_of(rows)
            held["a"].fill_(1), held["deep"]["b"].fill_(1)
            held["deep"].update(slots=9), held.update(new=1)
        for rows in store.row_sets():
            held = store.memory_of(rows)
            assert held["a"].sum() == held["deep"]["b"].sum() == 0
            assert held["deep"]["slots"] == 1 and "new" not in held
        assert store.state_bytes() == twin.state_bytes()


def test_dtypes_and_widths_are_those_given():
    store = Store([((0,), Ends(1, 2))], 2)
    store.append(torch.ones(1, 2, 100, 4).bfloat16(), torch.ones(1, 2, 100, 6).half())
    store.asked([torch.zeros(1, 2, 100, 4).bfloat16()], now=True)
    for view in store.views():
        assert (view.k.dtype, view.v.dtype) == (torch.bfloat16, torch.float16)
        assert (view.k.shape[3], view.v.shape[3]) == (4, 6)


def test_call_for_counts_from_what_was_seen():
    q, k = torch.zeros(1, 2, 2, 4), torch.zeros(1, 1, 3, 4)
    plain = call_for(q, View((0,), slice(0, 1), k, k, None, None), 3, (0, 1), layer=5)
    assert plain.contiguous and plain.layer == 5 and plain.heads == (0, 1)
    pos = torch.tensor([[[0, 8, 9]]])
    call = call_for(q, View((0,), slice(0, 1), k, k, pos, None), 10, (0, 1))
    assert call.q_pos.tolist() == [[8, 9]] and call.k_pos is pos


def test_errors():
    store = filled(Store([], HEADS), 3, B=2)
    with pytest.raises(InputError, match="batch of 1 rows was given, the store holds 2"):
        store.append(*tokens([[1]], 1, 1))
    with pytest.raises(InputError, match="2 key heads were given, the store has 3"):
        store.append(torch.zeros(2, 2, 1, D), torch.zeros(2, 2, 1, DV))
    with pytest.raises(InputError, match="4 tokens to remove, 3 are held"):
        store.crop(4)
    assert store.seen == [3, 3]
    with pytest.raises(InputError, match="row 1 is padding from end to end"):
        Store([], HEADS).append(*tokens([[1, 2]] * 2, 2, 2), torch.tensor([[True, True], [False, False]]))


def test_a_refused_batch_is_not_half_stored():
    store = Store([], HEADS)
    with pytest.raises(InputError, match="padding"):
        store.append(*tokens([[1, 2]] * 2, 2, 2), torch.tensor([[True, True], [False, False]]))
    assert store.seen == [] and store.bytes() == 0 and store.total == 0
    filled(store, 2, B=1)
    assert store.seen == [2]


def test_nothing_happens_to_an_empty_store():
    store = Store([((0,), Ends(1, 2))], HEADS)
    store.crop(3)
    store.select(torch.tensor([0]))
    store.settle()
    assert store.bytes() == 0 and store.seen == []
    Group((0,)).select(torch.tensor([0]))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_duo_holds_what_it_claims(pieces):
    policy = DuoAttention(sink=2, recent=5)
    store = Store([((0, 1, 2), policy)], HEADS)
    for n in pieces:
        filled(store, n)
        assert store.views()[0].k.shape[2] == policy.claim(store.seen[0])


class Mean:
    """Keeps the first two and the last `recent` slots; slot 2 is the mean of all that ever lay between."""

    def __init__(self, recent):
        self.recent = recent

    def keep(self, q, k, v, call):
        M = k.shape[2]
        if self.recent + 3 >= M:
            return None
        return torch.cat((torch.arange(2), torch.arange(M - self.recent - 1, M)))[None, None]

    def fold(self, k, v, bias, slots, call):
        gone = slice(2, k.shape[2] - self.recent)
        count = torch.ones_like(k[..., 0]) if bias is None else bias.exp().to(k.dtype)
        n = count[:, :, gone].sum(-1, keepdim=True)
        mean = [(t[:, :, gone] * count[:, :, gone, None]).sum(2) / n for t in (k, v)]
        return Fold(2, *mean, n.squeeze(-1).log().float())


def test_a_folded_slot_stands_for_all_that_was_dropped():
    store = Store([((0, 2), Mean(5))], HEADS)
    k, v = torch.randn(2, HEADS, 200, D).double(), torch.randn(2, HEADS, 200, DV).double()
    a = 0
    for n in (40, 1, 1, 90, 7, 61):
        store.append(k[:, :, a : a + n], v[:, :, a : a + n])
        store.asked([torch.zeros(2, 2 * HEADS, n, D).double()], now=True)
        a += n
        if a == 42:
            # beams: what was folded goes with its row
            store.select(torch.tensor([1, 1]))
            k, v = k[[1, 1]], v[[1, 1]]
    whole, folded = store.views()
    assert whole.bias is None and whole.k.shape[2] == 200
    assert folded.pos[0, 0].tolist() == [0, 1, 194, 195, 196, 197, 198, 199]
    torch.testing.assert_close(folded.k[:, :, 2], k[:, [0, 2], 2:195].mean(2))
    torch.testing.assert_close(folded.v[:, :, 2], v[:, [0, 2], 2:195].mean(2))
    want = torch.zeros(2, 2, 8)
    want[:, :, 2] = torch.tensor(193.0).log()
    torch.testing.assert_close(folded.bias, want)
    slots = sum(t.numel() * t.element_size() for g in store.groups for t in (g.k, g.v, g.pos, g.bias) if t is not None)
    assert store.bytes() == slots


def test_bytes_of_the_methods_memory():
    store = filled(Store([], HEADS), 10)
    assert store.state_bytes() == 0
    store.memory[0]["bounds"] = {"low": torch.zeros(3, 5), "note": "text"}
    store.memory[0]["list"] = [torch.zeros(2, dtype=torch.float64)]
    assert store.state_bytes() == 60 + 16
