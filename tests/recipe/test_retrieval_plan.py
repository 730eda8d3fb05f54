"""The reader's RetrievalAttention plan is what its recipe says, and reads what it may."""

import torch

from saccade.core.call import Call
from saccade.core.plan import Plan
from saccade.evaluate.presets import PLANS
from saccade.recipe.retrieval import retrieval


def test_the_shipped_plan_is_the_recipe():
    plan = retrieval()
    assert Plan.load(PLANS / "retrieval.json") == plan
    kinds = [[(a.method, a.phase, a.args["kind"]) for a in row] for row in plan.layers]
    assert kinds == [*[[("retrieval", "decode", "lists")]] * 7, [("retrieval", "decode", "flat")]]


def test_a_step_reads_less_than_a_fifth():
    length, share = 16384, []
    q, k = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
    for row in (retrieval().layers[3], retrieval().layers[7]):
        method, memory = row[0].build(length), {}
        past = [t[:, :, :-1] for t in (q, k)]
        method.prompt(*past, Call.of(*past, layer=3, memory=memory))
        call = Call.of(q[:, :, -1:], k, layer=3, memory=memory)
        chosen = method.select(q[:, :, -1:], k, call)
        assert chosen.parts[1].index.shape == (1, 4, 1, 100)
        # a search reads keys alone, the rest keys and values
        share.append(method.estimate(call) / (4 * length) / 2 + method.budget / length)
    before, last = share
    assert 0.5 < last < 0.55 and (7 * before + last) / 8 < 0.2
