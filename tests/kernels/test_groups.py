"""attend_groups against a loop over queries, and against attend where one group holds everything."""

import math

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Groups
from saccade.kernels.attend import attend
from saccade.kernels.groups import attend_groups


def make(B=2, H=4, G=2, N=7, M=9, D=4, E=3, C=3, W=5, W2=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, N, D, generator=rng, dtype=torch.float64)
    k = torch.randn(B, G, M, D, generator=rng, dtype=torch.float64)
    v = torch.randn(B, G, M, E, generator=rng, dtype=torch.float64)

    def draw(size, width):
        return torch.rand(B, H, C, size, generator=rng).topk(width, -1).indices.sort(-1).values

    return q, k, v, Groups(draw(N, W), draw(M, W2))


def loop(q, k, v, groups, q_pos, k_pos, causal=True):
    """Query by query, group by group; positions are [B, N] and [B, G, M]."""
    (B, H, N, D), G = q.shape, k.shape[1]
    o, count = q.new_zeros(B, H, N, v.shape[3]), torch.zeros(B, H, N, dtype=torch.long)
    for b in range(B):
        for h in range(H):
            g = h * G // H
            for rows, slots in zip(groups.q_index[b, h].tolist(), groups.k_index[b, h].tolist(), strict=True):
                for i in rows:
                    p = q_pos[b][i]
                    at = [j for j in slots if j >= 0 and k_pos[b][g][j] >= 0 and (not causal or k_pos[b][g][j] <= p)]
                    if i < 0 or p < 0 or not at:
                        continue
                    weight = torch.softmax(torch.stack([q[b, h, i] @ k[b, g, j] / math.sqrt(D) for j in at]), 0)
                    o[b, h, i] += sum(w * v[b, g, j] for w, j in zip(weight, at, strict=True))
                    count[b, h, i] += 1
    return o / count.clamp_min(1)[..., None], count


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_equals_the_loop(G, causal):
    q, k, v, groups = make(G=G)
    got = attend_groups(q, k, v, groups, Call.of(q, k, causal=causal))
    q_pos, k_pos = [[2, 3, 4, 5, 6, 7, 8]] * 2, [[list(range(9))] * G] * 2
    torch.testing.assert_close(got, loop(q, k, v, groups, q_pos, k_pos, causal))


def test_empty_members_and_given_positions():
    q, k, v, groups = make()
    groups.q_index[:, :, 0, 0], groups.k_index[:, :, 1, :2] = -1, -1
    groups.k_index[0, 0, 2] = -1
    q_pos = torch.tensor([[3, 4, 7, 8, 9, 10, 11], [-1, 5, 6, 7, 8, 9, 12]])
    k_pos = torch.tensor([[0, 1, 2, 4, 5, 8, 9, 10, 11], [-1, -1, 0, 5, 6, 7, 8, 9, 12]])[:, None].repeat(1, 2, 1)
    k_pos[0, 1, 3] = -1
    got = attend_groups(q, k, v, groups, Call.of(q, k, q_pos=q_pos, k_pos=k_pos))
    torch.testing.assert_close(got, loop(q, k, v, groups, q_pos.tolist(), k_pos.tolist()))


def test_order_inside_a_group_does_not_matter():
    q, k, v, groups = make()
    turned = Groups(groups.q_index.flip(-1), groups.k_index.flip(-1))
    torch.testing.assert_close(attend_groups(q, k, v, turned), attend_groups(q, k, v, groups))


@pytest.mark.parametrize("N", [1, 63, 64, 65])
def test_one_group_of_all_is_dense_attention(N):
    q, k, v, _ = make(N=N, M=N + 3, W=1, W2=1)
    everything = [torch.arange(n).expand(2, 4, 1, n) for n in (N, N + 3)]
    o, count = attend_groups(q, k, v, Groups(*everything))
    torch.testing.assert_close(o, attend(q, k, v).o)
    assert (count == 1).all()


def test_rows_in_no_group_give_zero_and_no_gradient():
    q, k, v, _ = make(N=6, M=6)
    q.requires_grad_()
    index = torch.tensor([[0, 2], [2, 5]]).expand(2, 4, 2, 2)
    o, count = attend_groups(q, k, v, Groups(index, index))
    assert count[0, 0].tolist() == [1, 0, 2, 0, 0, 1]
    assert (o[:, :, [1, 3, 4]] == 0).all() and (o[:, :, [0, 2, 5]] != 0).all()
    o.square().sum().backward()
    assert (q.grad[:, :, [1, 3, 4]] == 0).all() and q.grad.isfinite().all()


def test_two_pairs_by_hand():
    # two groups of two: the first of each sees itself, the second weighs both by exp(q.k)
    q = torch.tensor([1.0, 0.0, 2.0, 0.0]).view(1, 1, 4, 1)
    v = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1)
    index = torch.tensor([[0, 1], [2, 3]]).view(1, 1, 2, 2)
    o, _ = attend_groups(q, q, v, Groups(index, index))
    torch.testing.assert_close(o.flatten(), torch.tensor([1.0, 1.5, 3.0, 3.5]))


def test_for_fixed_groups_later_values_change_nothing():
    q, k, v, groups = make(N=9, M=9)
    other = v.clone()
    other[:, :, 5:] += 1.0
    a, b = attend_groups(q, k, v, groups)[0], attend_groups(q, k, other, groups)[0]
    assert torch.equal(a[:, :, :5], b[:, :, :5]) and not torch.equal(a, b)


def test_gradients():
    q, k, v, groups = make(B=1, H=2, G=1, N=4, M=5, C=2, W=3, W2=3)
    groups.k_index[0, 0, 0] = torch.tensor([-1, 3, 4])
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend_groups(q, k, v, groups)[0], leaves)


def test_bad_groups_say_what_was_seen():
    q, k, v, groups = make()
    with pytest.raises(InputError, match=r"\[-1, 7\)"):
        attend_groups(q, k, v, Groups(groups.q_index + 5, groups.k_index))
    with pytest.raises(InputError, match=r"start with \[2, 4\]"):
        attend_groups(q, k, v, Groups(groups.q_index[:1], groups.k_index[:1]))
    with pytest.raises(InputError, match="share all but the last"):
        attend_groups(q, k, v, Groups(groups.q_index[:, :, :2], groups.k_index))
    with pytest.raises(InputError, match="empty"):
        attend_groups(q, k, v, Groups(groups.q_index[..., :0], groups.k_index))
