"""What is true of S2: windows and stripes of blocks, other stripes in each head, and everything between them."""

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.methods.select.s2 import S2Attention


def sharded(N, M, heads, block, local, stride, step=1, share=1):
    """Query at position i of block bi reads block bj <= bi in the window, or where bj + shift of the head fits."""
    mask = torch.zeros(len(heads), N, M, dtype=torch.bool)
    for at, head in enumerate(heads):
        for row in range(N):
            i = M - N + row
            for j in range(i + 1):
                bi, bj = i // block, j // block
                mask[at, row, j] = bi - bj < local or (bj + head // share * step) % stride == 0
    return mask


def masked(method, N, M, heads=(0, 1, 2, 3)):
    q, k = torch.zeros(1, len(heads), N, 2), torch.zeros(1, 1, M, 2)
    call = Call.of(q, k, heads=tuple(heads))
    return method.select(q, k, call).mask(call)[0]


LENGTHS = [(1, 1), (7, 7), (63, 63), (64, 64), (65, 65), (129, 129), (200, 200)]


@pytest.mark.parametrize(("N", "M"), [*LENGTHS, (1, 200), (12, 100), (33, 201), (64, 128), (17, 18)])
@pytest.mark.parametrize(
    "args",
    [
        {"block": 8, "local": 2, "stride": 3},
        {"block": 12, "local": 1, "stride": 5, "step": 2},
        {"block": 7, "local": 3, "stride": 4, "share": 2},
        {"block": 64, "local": 16, "stride": 16},
    ],
)
def test_matches_paper_loop(N, M, args):
    torch.manual_seed(0)
    heads, method = (0, 1, 2, 5), S2Attention(**args)
    want = sharded(N, M, heads, **args)
    assert torch.equal(masked(method, N, M, heads), want)
    q, k, v = torch.randn(1, 4, N, 8), torch.randn(1, 2, M, 8), torch.randn(1, 2, M, 8)
    call = Call.of(q, k, heads=heads)
    assert method.select(q, k, call).pairs(call) == want.sum()
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=want[None], enable_gqa=True)
    torch.testing.assert_close(method.attend(q, k, v, call).o, o, atol=1e-5, rtol=1e-5)


def test_by_hand():
    # six blocks of one token: head 0 has stripes 0 and 3, head 1 2 and 5, head 2 1 and 4
    mask = masked(S2Attention(block=1, local=1, stride=3), 6, 6, (0, 1, 2))
    stripes = ({0, 3}, {2, 5}, {1, 4})
    for head, blocks in enumerate(stripes):
        for i in range(6):
            assert set(mask[head, i].nonzero().flatten().tolist()) == {j for j in blocks | {i} if j <= i}


@pytest.mark.parametrize(("stride", "step", "heads"), [(4, 1, 4), (4, 1, 6), (5, 2, 5), (8, 3, 8)])
def test_every_query_reaches_every_shard_in_some_head(stride, step, heads):
    mask = masked(S2Attention(block=4, local=2, stride=stride, step=step), 150, 150, range(heads))
    assert torch.equal(mask.any(0), torch.ones(150, 150, dtype=torch.bool).tril())
    # the control: heads that all read the same stripes leave much of the past unread, and are no cheaper
    same = masked(S2Attention(block=4, local=2, stride=stride, share=heads), 150, 150, range(heads))
    assert same.sum() >= mask.sum()
    assert same.any(0).sum() < 0.6 * mask.any(0).sum()


def test_fewer_heads_than_shards_reach_as_many_as_there_are_heads():
    mask = masked(S2Attention(block=1, local=1, stride=8), 100, 100, range(3))
    far = mask.any(0)[99, :99].float().mean()
    assert abs(far - 3 / 8) < 0.02


def test_density_is_the_window_and_one_in_stride():
    N, block, local, stride = 8192, 64, 8, 16
    q = torch.zeros(1, 16, N, 1)
    call = Call.of(q, q[:, :1])
    share = local * block / N  # of N, and of half of N in each of the rows but the first
    window = 2 * share - share**2
    want = window + (1 - share) ** 2 / stride
    pattern = S2Attention(block=block, local=local, stride=stride).select(q, q[:, :1], call)
    assert abs(pattern.density(call) - want) < 0.01
    assert pattern.index.shape == (1, 16, N // block, local + (N // block - 1 - local) // stride + 1)


def test_what_has_left_the_window_unread_is_never_read_again():
    mask = masked(S2Attention(block=6, local=2, stride=3), 200, 200)
    for i in range(199):
        gone = ~mask[:, i, : i + 1]
        assert not mask[:, i + 1, : i + 1][gone].any()


def test_chunks_and_single_tokens_equal_one_shot():
    torch.manual_seed(0)
    method, x = S2Attention(block=8, local=1, stride=3), torch.randn(1, 4, 100, 8)
    whole = method.attend(x, x, x, Call.of(x, x)).o
    parts = []
    for a, b in [(0, 13), (13, 40), (40, 80), *((i, i + 1) for i in range(80, 100))]:
        q, k = x[:, :, a:b], x[:, :, :b]
        parts.append(method.attend(q, k, k, Call.of(q, k)).o)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=1e-5)


def test_heads_of_a_set_share_and_keep_their_number():
    method = S2Attention(block=4, local=1, stride=4, share=2)
    whole = masked(method, 90, 90, range(8))
    for head in (0, 2, 4, 6):
        assert torch.equal(whole[head], whole[head + 1])
    assert not torch.equal(whole[0], whole[2])
    assert torch.equal(masked(method, 90, 90, (5, 1)), whole[[5, 1]])


@pytest.mark.parametrize("args", [{"stride": 1}, {"local": 100}])
def test_dense_at_full_budget(args):
    assert torch.equal(masked(S2Attention(block=4, **args), 99, 150)[0], torch.ones(99, 150).bool().tril(51))


@pytest.mark.parametrize("name", ["block", "local", "stride", "step", "share"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True])
def test_refuses(name, value):
    with pytest.raises(InputError, match=f"S2Attention: {name}"):
        S2Attention(**{name: value})


def test_refuses_holes_and_looking_ahead():
    q, k = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 2)
    holes = Call.of(q, k, q_pos=torch.tensor([[8, 9]]), k_pos=torch.tensor([[[0, 8, 9]]]))
    for call in (holes, Call.of(q, k, causal=False)):
        with pytest.raises(UnsupportedError, match="S2Attention"):
            S2Attention().select(q, k, call)
