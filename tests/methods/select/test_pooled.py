"""What is true of pooled: means of 64, the largest products, and early rows that are dense."""

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.methods.controls.random import Random
from saccade.methods.select.pooled import Pooled
from saccade.methods.select.streaming import Streaming


def block_sparse(q, k, count):
    """Key blocks per (batch, head, query block) for a whole prompt, in plain floats, as the paper ranks them."""
    B, H, N, D = q.shape
    G = k.shape[1]
    q, k = q.tolist(), k.tolist()

    def mean(rows):
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    lists = []
    for b in range(B):
        for h in range(H):
            keys = [mean(k[b][h * G // H][s : s + 64]) for s in range(0, N, 64)]
            for m in range(0, N, 64):
                query = mean(q[b][h][m : m + 64])
                past = [j for j in range(len(keys)) if 64 * j <= m]
                past.sort(
                    key=lambda j, query=query, keys=keys: -sum(x * y for x, y in zip(query, keys[j], strict=True))
                )
                lists.append(sorted(past[:count]))
    return lists


@pytest.mark.parametrize("N", [1, 7, 63, 64, 65, 127, 128, 129, 200, 1000])
@pytest.mark.parametrize("count", [1, 3])
def test_matches_paper_loop(N, count):
    torch.manual_seed(N)
    q, k = torch.randn(2, 4, N, 4, dtype=torch.float64), torch.randn(2, 2, N, 4, dtype=torch.float64)
    v, call, method = torch.randn(2, 2, N, 4, dtype=torch.float64), Call.of(q, k), Pooled(budget=64 * count)
    pattern = method.select(q, k, call)
    lists = block_sparse(q, k, count)
    assert [[j for j in row if j >= 0] for row in pattern.index.flatten(0, 2).tolist()] == lists
    table = torch.zeros(len(lists), -(-N // 64))
    for row, blocks in enumerate(lists):
        table[row, blocks] = 1.0
    table = table.view(2, 4, -(-N // 64), -1).repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :N, :N]
    seen = table.bool() & torch.ones(N, N, dtype=torch.bool).tril()
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(method.attend(q, k, v, call).o, o, atol=1e-9, rtol=1e-9)


def test_dense_up_to_the_budget():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 200, 8), torch.randn(1, 1, 200, 8)
    call = Call.of(q, k)
    assert Pooled().budget == 100 * 64  # the paper's hundred blocks
    assert Pooled().select(q, k, call).density(call) == 1.0
    assert Pooled(budget=1.0).select(q, k, call).density(call) == 1.0
    # the first four query blocks have no more blocks to choose from than they may read
    longer = torch.randn(1, 1, 640, 8)
    mask = Pooled(budget=256).select(longer, longer, Call.of(longer, longer)).mask(Call.of(longer, longer))[0, 0]
    assert mask[:256].sum() == 256 * 257 // 2
    assert mask[256:].sum(-1).max() <= 256


@pytest.mark.parametrize(("N", "M"), [(1, 65), (64, 100), (70, 199), (130, 333)])
def test_a_chunk_at_an_odd_offset_leaves_no_row_empty(N, M):
    torch.manual_seed(0)
    # every key is better than the one before, so that each query block would pick its very last key block
    q, k = torch.ones(1, 1, N, 1), torch.arange(float(M)).view(1, 1, M, 1)
    call = Call.of(q, k)
    pattern = Pooled(budget=64).select(q, k, call)
    assert pattern.mask(call).any(-1).all()
    assert pattern.index.shape[3] == 1


def test_the_scale_does_not_matter():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 512, 8), torch.randn(1, 2, 512, 8)
    one, two = (Pooled(budget=128).select(q, k, Call.of(q, k, scale=s)).index for s in (None, 7.0))
    assert torch.equal(one, two)


def test_estimate_counts_pooled_pairs():
    call = Call.of(torch.zeros(2, 3, 65, 2), torch.zeros(2, 1, 129, 2))
    assert Pooled().estimate(call) == 2 * 3 * 2 * 3


@pytest.mark.parametrize("seed", range(3))
def test_means_find_topics_and_hide_single_keys(seed):
    # every block of keys is of a topic; a block of queries asks for three topics, or one query of it for one key
    g = torch.Generator().manual_seed(seed)
    N, D, block, budget = 2048, 64, 64, 320
    topics = torch.randn(N // block, D, generator=g).sign()
    k = topics.repeat_interleave(block, 0) + 0.3 * torch.randn(N, D, generator=g)
    wanted = torch.stack([topics[torch.randperm(i + 1, generator=g)[:3]].sum(0) for i in range(N // block)])
    q = wanted.repeat_interleave(block, 0) + 0.3 * torch.randn(N, D, generator=g)
    call = Call.of(q[None, None], k[None, None], scale=9 / D)
    rows = torch.arange(N // 2, N)

    def kept(method, q, k, rows):
        mask = method.select(q[None, None], k[None, None], call).mask(call, rows)[0, 0]
        scores = (q[rows] @ k.T * 9 / D).masked_fill(torch.arange(N) > rows[:, None], -float("inf"))
        return float((torch.softmax(scores, -1) * mask).sum(-1).mean())

    methods = (Pooled(budget=budget), Random(budget=budget), Streaming(sink=64, recent=budget))
    means, lot, near = (kept(method, q, k, rows) for method in methods)
    assert means > 0.9 and max(lot, near) < 0.5
    # the control: a lone query that asks for a lone key, in a block whose other queries look away from it
    code = torch.randn(D, generator=g).sign()
    k[1000], q[-64:], q[-1] = 2 * code, q[-64:] - code, 2 * code
    last = torch.tensor([N - 1])
    assert kept(methods[0], q, k, last) < 0.1 and kept(Pooled(budget=1.0), q, k, last) > 0.99


@pytest.mark.parametrize("args", [{"budget": 0}, {"budget": -64}, {"budget": 0.0}, {"budget": 1.01}, {"block_q": 0}])
def test_refuses(args):
    with pytest.raises(InputError, match="Pooled"):
        Pooled(**args)


def test_refuses_holes():
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)
    call = Call.of(q, k, q_pos=torch.tensor([[9]]), k_pos=torch.tensor([[[0, 4, 9]]]))
    with pytest.raises(UnsupportedError, match="Pooled"):
        Pooled().select(q, k, call)
