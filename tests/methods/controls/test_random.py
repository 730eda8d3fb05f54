"""What is true of random: blind to content, never an empty row, and the same lot for a head wherever it is called."""

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.methods.controls.random import Random


def index(method, N, M, H=4, content=0.0, **fields):
    q, k = torch.full((2, H, N, 2), content), torch.full((2, 2 if H == 4 else 1, M, 2), content)
    return method.select(q, k, Call.of(q, k, **fields)).index


def test_content_does_not_matter():
    method = Random(budget=16, block_q=8, block_k=8)
    torch.manual_seed(0)
    one = index(method, 64, 64, content=1.0)
    torch.manual_seed(1)
    assert torch.equal(one, index(method, 64, 64, content=-3.0))


def test_seed_layer_and_head_each_change_the_draw():
    method = Random(budget=0.25, block_q=8, block_k=8)
    base = index(method, 128, 128)
    assert not torch.equal(base, index(Random(budget=0.25, block_q=8, block_k=8, seed=1), 128, 128))
    assert not torch.equal(base, index(method, 128, 128, layer=1))
    assert not torch.equal(base[:, 0], base[:, 1])


def test_a_head_draws_the_same_in_any_company():
    method = Random(budget=0.25, block_q=8, block_k=8)
    q, k = torch.zeros(1, 4, 128, 2), torch.zeros(1, 4, 128, 2)
    call = Call.of(q, k, layer=3)
    every = method.select(q, k, call).index
    some = method.select(q[:, [1, 3]], k[:, [1, 3]], call.take((1, 3), (1, 3))).index
    assert torch.equal(some, every[:, [1, 3]])


def test_a_generator_takes_the_place_of_the_seed():
    method = Random(budget=0.25, block_q=8, block_k=8)
    rng = torch.Generator().manual_seed(5)
    one, two = index(method, 128, 128, rng=rng), index(method, 128, 128, rng=rng)
    again = index(Random(budget=0.25, block_q=8, block_k=8, seed=9), 128, 128, rng=torch.Generator().manual_seed(5))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(("N", "M"), [(1, 1), (1, 200), (7, 7), (63, 63), (64, 64), (65, 65), (129, 200), (70, 333)])
@pytest.mark.parametrize("blocks", [(64, 64), (16, 64), (64, 16)])
def test_no_row_is_empty_and_the_budget_holds(N, M, blocks):
    q, k = torch.zeros(1, 4, N, 2), torch.zeros(1, 2, M, 2)
    call = Call.of(q, k)
    method = Random(budget=blocks[1], block_q=blocks[0], block_k=blocks[1])
    pattern = method.select(q, k, call)
    seen = pattern.mask(call).sum(-1)
    assert seen.min() >= 1
    assert seen.max() <= blocks[1]
    assert pattern.index.shape[3] == 1


def test_draws_evenly():
    # 400 draws of 1 past block out of 4, beside the own one
    method = Random(budget=128)
    drawn = torch.stack([index(method, 1, 320, layer=n)[0, :, 0] for n in range(100)])
    counts = torch.bincount(drawn[drawn != 4].flatten(), minlength=4)
    assert (drawn == 4).sum() == 400
    assert counts.sum() == 400
    assert counts.min() > 60  # expected 100, six standard deviations are 52


@pytest.mark.parametrize("args", [{"budget": 0}, {"budget": -5}, {"seed": -1}, {"seed": 0.5}, {"block_k": 0}])
def test_refuses(args):
    with pytest.raises(InputError, match="Random"):
        Random(**args)


def test_refuses_holes():
    with pytest.raises(UnsupportedError, match="Random"):
        index(Random(), 1, 3, q_pos=torch.tensor([[9]]), k_pos=torch.tensor([[[0, 4, 9]]]))
