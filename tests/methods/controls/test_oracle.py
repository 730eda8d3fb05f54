"""What is true of the oracle: no choice of as many blocks holds more softmax mass."""

import math

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.methods.controls.oracle import Oracle


def heaviest(q, k, count, block_q, block_k):
    """Lists of key blocks [b][h][query block], from the definition, in plain floats."""
    B, H, N, D = q.shape
    G, M = k.shape[1:3]
    q, k = q.tolist(), k.tolist()
    lists = []
    for b in range(B):
        for h in range(H):
            for start in range(0, N, block_q):
                mass = [0.0] * -(-M // block_k)
                for i in range(start, min(start + block_q, N)):
                    seen = M - N + i + 1
                    keys = k[b][h * G // H][:seen]
                    w = [
                        math.exp(sum(x * y for x, y in zip(q[b][h][i], key, strict=True)) / math.sqrt(D))
                        for key in keys
                    ]
                    for j, weight in enumerate(w):
                        mass[j // block_k] += weight / sum(w)
                last = M - N + min(start + block_q, N)
                order = sorted(range(-(-last // block_k)), key=lambda block: -mass[block])
                lists.append(sorted(order[:count]))
    return lists


@pytest.mark.parametrize(
    ("N", "M", "block"), [(1, 1, 64), (1, 65, 8), (7, 7, 2), (63, 63, 8), (65, 65, 16), (20, 33, 8)]
)
def test_finds_the_heaviest_blocks(N, M, block):
    torch.manual_seed(N * M)
    q, k = torch.randn(2, 4, N, 3, dtype=torch.float64) * 2, torch.randn(2, 2, M, 3, dtype=torch.float64) * 2
    found = Oracle(budget=2 * block, block_q=block, block_k=block).select(q, k, Call.of(q, k)).index
    lists = [[j for j in row if j >= 0] for row in found.flatten(0, 2).tolist()]
    assert lists == heaviest(q, k, 2, block, block)


def test_holds_more_mass_than_any_other_block():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 2, 256, 8)
    call = Call.of(q, k)
    probs = torch.softmax(
        (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~torch.ones(64, 256).tril(192).bool(), float("-inf")), -1
    )
    mass = probs.view(1, 2, 64, 4, 64).sum((2, 4))
    assert Oracle(budget=64).select(q, k, call).index.flatten().tolist() == mass.argmax(-1).flatten().tolist()


def test_scale_counts():
    # with a scale of 0 all visible keys weigh alike, so the first block, seen by all rows, weighs most
    q, k = torch.zeros(1, 1, 128, 1), torch.zeros(1, 1, 128, 1)
    q[:], k[:, :, 64:] = 1.0, 9.0
    assert Oracle(budget=64).select(q, k, Call.of(q, k)).index.flatten().tolist() == [0, 1]
    assert Oracle(budget=64).select(q, k, Call.of(q, k, scale=0.0)).index.flatten().tolist() == [0, 0]


def test_says_that_it_costs_a_dense_map():
    call = Call.of(torch.zeros(1, 3, 10, 2), torch.zeros(1, 1, 10, 2))
    assert Oracle().estimate(call) == 3 * 55


@pytest.mark.parametrize("args", [{"budget": 0}, {"budget": -0.1}, {"budget": 1.5}, {"block_q": 0}, {"block_k": -1}])
def test_refuses(args):
    with pytest.raises(InputError, match="Oracle"):
        Oracle(**args)


def test_refuses_holes():
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)
    call = Call.of(q, k, q_pos=torch.tensor([[9]]), k_pos=torch.tensor([[[0, 4, 9]]]))
    with pytest.raises(UnsupportedError, match="Oracle"):
        Oracle().select(q, k, call)
