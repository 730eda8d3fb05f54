"""Call: positions, heads, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.core.call import Call, kv_heads
from saccade.core.errors import InputError


def tensors(B=2, H=4, G=2, N=3, M=7, D=8):
    return torch.zeros(B, H, N, D), torch.zeros(B, G, M, D), torch.zeros(B, G, M, D)


def test_queries_are_the_last_of_the_keys():
    q, k, _ = tensors()
    q_pos, k_pos = Call.of(q, k).positions()
    assert q_pos.tolist() == [[4, 5, 6]]
    assert k_pos.tolist() == [[[0, 1, 2, 3, 4, 5, 6]]]


def test_given_positions_are_handed_back():
    q, k, _ = tensors(B=1, N=1, M=3)
    q_pos, k_pos = torch.tensor([[9]]), torch.tensor([[[0, 5, 9]]])
    call = Call.of(q, k, q_pos=q_pos, k_pos=k_pos)
    assert call.positions() == (q_pos, k_pos)
    assert not call.contiguous


@pytest.mark.parametrize(("causal", "seen"), [(True, [1, 1, 0, 0]), (False, [1, 1, 1, 0])])
def test_sees(causal, seen):
    q, k, _ = tensors()
    call = Call.of(q, k, causal=causal)
    assert call.sees(torch.tensor(5), torch.tensor([0, 5, 6, -1])).int().tolist() == seen
    assert not call.sees(torch.tensor(-1), torch.tensor([-1, 0])).any()


def test_scale():
    q, k, _ = tensors()
    assert Call.of(q, k).softmax_scale(64) == 0.125
    assert Call.of(q, k, scale=0.3).softmax_scale(64) == 0.3


def test_state_is_each_call_s_own():
    q, k, _ = tensors()
    a, b = Call.of(q, k), Call.of(q, k)
    a.memory["x"], a.step["y"] = 1, 2
    assert not b.memory and not b.step
    part = a.take((0,), (0,))
    assert part.memory is a.memory and part.step is a.step


def test_take_keeps_global_ids():
    q, k, _ = tensors(B=1, M=2)
    k_pos = torch.tensor([[[0, 1], [0, 2]]])
    call = Call.of(q, k, heads=(4, 5, 6, 7), q_pos=torch.zeros(1, 3).long(), k_pos=k_pos)
    part = call.take((2, 3), (1,))
    assert part.heads == (6, 7)
    assert part.shape == (1, 2, 1, 3, 2)
    assert part.k_pos.tolist() == [[[0, 2]]]
    assert part.take((1,), (0,)).heads == (7,)


@given(st.lists(st.integers(0, 11), min_size=1, max_size=12), st.sampled_from([1, 2, 3, 4]))
def test_kv_heads_lead_every_query_head_to_its_own(heads, share):
    kv = kv_heads(heads, share)
    assert len(heads) % len(kv) == 0
    each = len(heads) // len(kv)
    assert [kv[i // each] for i in range(len(heads))] == [h // share for h in heads]


BAD = {
    "three axes": (lambda q, k, v: (q[0], k, v), "must be"),
    "dtypes": (lambda q, k, v: (q.double(), k, v), "share a dtype"),
    "integers": (lambda q, k, v: (q.long(), k.long(), v.long()), "floating point"),
    "lengths": (lambda q, k, v: (q, k, v[:, :, :5]), r"\[2, 2, 7, 8\].*\[2, 2, 5, 8\]"),
    "kv heads": (lambda q, k, v: (q, k, v[:, :1]), r"\[2, 2, 7, 8\].*\[2, 1, 7, 8\]"),
    "batch": (lambda q, k, v: (q[:1], k, v), r"\[1, 4, 3, 8\]"),
    "width": (lambda q, k, v: (q[..., :4], k, v), "width"),
    "head count": (lambda q, k, v: (q[:, :3], k, v), "3 query heads cannot share 2 key heads"),
    "no keys": (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "empty"),
    "no queries": (lambda q, k, v: (q[:, :, :0], k, v), "empty"),
    "no batch": (lambda q, k, v: (q[:0], k[:0], v[:0]), "empty"),
    "more queries than keys": (lambda q, k, v: (q, k[:, :, :2], v[:, :, :2]), "3 queries but 2 keys"),
}


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_do_not_fit(name):
    spoil, says = BAD[name]
    q, k, v = spoil(*tensors())
    with pytest.raises(InputError, match=says) as found:
        (Call.of(q, k) if q.ndim == 4 else Call.of(*tensors()[:2])).check(q, k, v)
    assert isinstance(found.value, ValueError)


def test_a_call_for_other_tensors():
    q, k, v = tensors()
    with pytest.raises(InputError, match="use Call"):
        Call.of(q, k).check(q[:, :, :2], k, v)
    with pytest.raises(InputError, match="must be"):
        Call.of(q[0], k)


@pytest.mark.parametrize(
    ("q_pos", "k_pos", "says"),
    [
        ((1, 3), None, "both"),
        (None, (1, 1, 7), "both"),
        ((1, 4), (1, 1, 7), "q_pos"),
        ((3,), (1, 1, 7), "q_pos"),
        ((3, 3), (1, 1, 7), "q_pos"),
        ((1, 3), (1, 7), "k_pos"),
        ((1, 3), (1, 4, 7), "k_pos"),
        ((1, 3), (2, 2, 6), "k_pos"),
        ((1, 3), (3, 2, 7), "k_pos"),
    ],
)
def test_positions_that_do_not_fit(q_pos, k_pos, says):
    q, k, v = tensors()
    q_pos, k_pos = (None if s is None else torch.zeros(s, dtype=torch.long) for s in (q_pos, k_pos))
    with pytest.raises(InputError, match=says):
        Call.of(q, k, q_pos=q_pos, k_pos=k_pos).check(q, k, v)
