"""What is true of MInference's search: each head gets the pattern it was built for, none pays more than allowed."""

import json

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.table import build
from saccade.fit.minference import CANDIDATES, assign, search

N, D = 2048, 32


@pytest.fixture(scope="module")
def heads():
    """Head 0 looks back a little way and at a sink, head 1 at single keys, head 2 at one block per block of queries."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.zeros(1, 3, N, D), torch.zeros(1, 3, N, D)
    q[0, 0, :, 0], k[0, 0, :, 0] = 1.0, 0.02 * torch.arange(N)
    q[0, 0, :, 1], k[0, 0, 0, 1] = 0.02 * torch.arange(N) + 4.0, 1.0
    q[0, 1, :, 0] = 1.0
    k[0, 1, torch.randperm(N // 2, generator=g)[:20] + 40, 0] = 12.0
    for block in range(N // 64):
        k[0, 2, 64 * block : 64 * block + 64, block] = 1.0
        q[0, 2, 64 * block : 64 * block + 64, int(torch.randint(block + 1, (1,), generator=g))] = 12.0
    scale = D**0.5  # the logits above are meant as they stand
    return q * scale, k, torch.randn(1, 3, N, 8, generator=g)


def cost(q, k, head, name, args):
    """Pairs visited and scored as a share of dense, by counting the mask."""
    method, call = build(name, args), Call.of(q[:, head : head + 1], k[:, head : head + 1])
    pattern = method.select(q[:, head : head + 1], k[:, head : head + 1], call)
    return (pattern.mask(call).sum().item() + method.estimate(call)) / (N * (N + 1) / 2)


def error(q, k, v, head, name, args):
    """Relative output error over the rows behind the first eighth, by attending."""
    q, k, v = (t[:, head : head + 1] for t in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, N // 8 :]
    found = build(name, args).attend(q, k, v, Call.of(q, k)).o[:, :, N // 8 :]
    return ((found - want).norm() / want.norm()).item()


def test_each_head_gets_its_own_pattern(heads):
    q, k, v = heads
    found = search(q, k, v, budget=0.3)
    assert [name for name, _, _ in found] == ["streaming", "minference", "pooled"]
    assert found[1][2] < 0.05
    assert found[2][2] < 0.05
    for head, (name, args, _) in enumerate(found):
        assert cost(q, k, head, name, args) <= 0.3
        # and the allowance is used, not left: sizes fall by a fourth root of two, blocks are 64 wide
        assert cost(q, k, head, name, args) > 0.2


def test_the_winner_is_the_best_of_the_candidates(heads):
    q, k, v = heads
    found = search(q, k, v, budget=0.3, rows=128)
    each = [search(q, k, v, budget=0.3, rows=128, candidates=[candidate]) for candidate in CANDIDATES]
    for head in range(3):
        assert found[head] == min((one[head] for one in each), key=lambda entry: entry[2])


def test_the_error_is_that_of_the_output(heads):
    q, k, v = heads
    for candidate in CANDIDATES[:2]:
        for head, (name, args, score) in enumerate(search(q, k, v, budget=0.3, rows=N, candidates=[candidate])):
            assert score == pytest.approx(error(q, k, v, head, name, args), rel=1e-2, abs=1e-4)


def test_without_a_budget_sizes_stay_as_they_are(heads):
    q, k, v = heads
    fixed = [("streaming", {"sink": 4, "recent": 64}), ("pooled", {"budget": 256})]
    found = search(q, k, v, budget=None, candidates=fixed)
    assert found[0][:2] == fixed[0]
    assert found[2][:2] == fixed[1]


def test_more_budget_is_never_worse(heads):
    q, k, v = heads
    errors = [[e for _, _, e in search(q, k, v, budget=b, rows=512)] for b in (0.1, 0.3, 1.0)]
    for head in range(3):
        assert errors[0][head] >= errors[1][head] >= errors[2][head]
    # streaming needs no estimate, so the whole allowance buys dense attention
    assert max(errors[2]) < 1e-5


def test_heads_that_share_keys():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 700, 16), torch.randn(1, 2, 700, 16), torch.randn(1, 2, 700, 16)
    whole = search(q, k, v, budget=0.5, rows=700)
    for h in range(4):
        [alone] = search(q[:, h : h + 1], k[:, [h // 2]], v[:, [h // 2]], budget=0.5, rows=700)
        assert alone[:2] == whole[h][:2]
        assert alone[2] == pytest.approx(whole[h][2], abs=1e-5)


def test_assign_gives_plain_data(heads):
    q, k, v = heads
    layers = assign([(q, k, v), (q.flip(1), k.flip(1), v.flip(1))], budget=0.3)
    assert [[name for name, _ in heads] for heads in layers] == [
        ["streaming", "minference", "pooled"],
        ["pooled", "minference", "streaming"],
    ]
    assert json.loads(json.dumps(layers)) == [[list(entry) for entry in heads] for heads in layers]
    for heads in layers:
        for name, args in heads:
            build(name, args)


def test_the_candidates_are_methods():
    for name, args in CANDIDATES:
        build(name, args)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"budget": 0.0}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"candidates": []}, "candidate"),
        ({"rows": 0}, "row"),
        ({"budget": 0.05, "candidates": CANDIDATES[1:2]}, r"heads \[0, 1, 2\]; raise budget"),
    ],
)
def test_refuses(heads, args, words):
    with pytest.raises(InputError, match=words):
        search(*heads, **args)


def test_refuses_a_batch_or_part_of_a_sample():
    x = torch.zeros(2, 1, 64, 4)
    with pytest.raises(InputError, match="one whole sample"):
        search(x, x, x)
    with pytest.raises(InputError, match="one whole sample"):
        search(x[:1, :, :3], x[:1], x[:1])
