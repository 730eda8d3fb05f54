"""RetrievalAttention's claim: where queries lie far from keys, an index drawn from queries finds what they want."""

import importlib.util

import pytest
import torch

from saccade.core.call import Call
from saccade.core.pattern import Tokens, Union, Window
from saccade.kernels.attend import attend
from saccade.methods.decode.retrieval import RetrievalAttention

D, FEW, SINK, NEAR, FOUND, ASKED = 32, 5, 16, 32, 40, 16


def head(length, kind, seed):
    """Queries of a prompt, queries that are asked behind it, keys, values.

    Keys differ little in five channels; "far" queries look at those alone, "like" queries are drawn as keys are.
    """
    rng = torch.Generator().manual_seed(seed)
    spread = torch.cat((torch.full((FEW,), 1.0), torch.full((D - FEW,), 3.0)))
    look = torch.cat((torch.full((FEW,), 16.0), torch.full((D - FEW,), 0.3))) if kind == "far" else spread
    k = torch.randn(1, 1, length, D, generator=rng) * spread
    q = torch.randn(1, 1, length // 7 + ASKED, D, generator=rng) * look
    return q[:, :, :-ASKED], q[:, :, -ASKED:], k, torch.randn(k.shape, generator=rng)


def error(kind, queue, prompt, q, k, v):
    """Relative error of the outputs by an index of this kind, and the share of the keys that was scanned for them."""
    sizes = dict(budget=SINK + NEAR + FOUND, sink=SINK, near=NEAR, queue=queue, learn=5000, wait=True)
    method, call = RetrievalAttention(kind=kind, **sizes), Call.of(q, k)
    method.prompt(prompt, k, Call.of(prompt, k, memory=call.memory))
    o, want = method.attend(q, k, v, call).o, attend(q, k, v, None, call).o
    return distance(o, want), method.estimate(call) / (ASKED * k.shape[2])


def distance(o, want):
    return float((o - want).norm() / want.norm())


def controls(q, k, v):
    """A window of as many keys, and as many by lot in place of those that are found."""
    call, rng = Call.of(q, k), torch.Generator().manual_seed(1)
    lot = torch.randint(SINK, k.shape[2] - NEAR - ASKED, (1, 1, ASKED, FOUND), generator=rng).int()
    patterns = Window(SINK, NEAR + FOUND), Union((Window(SINK, NEAR), Tokens(lot)))
    want = attend(q, k, v, None, call).o
    return [distance(attend(q, k, v, pattern, call).o, want) for pattern in patterns]


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss has the index that knows keys only")
@pytest.mark.parametrize(
    ("length", "share"), [(8000, 0.09), pytest.param(20_000, 0.04, marks=pytest.mark.slow)], ids=["8k", "20k"]
)
def test_outputs_from_a_small_share_of_the_keys(length, share):
    """An index of keys alone finds nothing even where it scans more; where queries are like keys it is no worse."""
    far, like = head(length, "far", 0), head(length, "like", 0)
    # measured at 20000 tokens, two draws: 0.10 to 0.16 from 3.2 % of the keys, against 1.05 to 1.14 from 12.6 %
    wrong, scanned = error("graph", 40, *far)
    assert wrong < 0.25 and scanned < share
    keys_only, more = error("faiss-hnsw", 100, *far)
    assert more > 1.5 * scanned and keys_only > 4 * wrong
    assert min(controls(*far[1:])) > 4 * wrong
    # the control: nothing is gained from knowing queries that lie where keys lie
    (wrong, scanned), (keys_only, other) = error("graph", 100, *like), error("faiss-hnsw", 100, *like)
    assert keys_only <= wrong and other <= scanned
