"""The reader's Quest plan is what its recipe says, and reads what it may."""

import torch

from saccade.core.call import Call
from saccade.core.plan import Plan
from saccade.evaluate.presets import PLANS
from saccade.recipe.quest import quest


def test_the_shipped_plan_is_the_recipe():
    plan = quest()
    assert Plan.load(PLANS / "quest.json") == plan
    assert [[(a.method, a.phase) for a in row] for row in plan.layers] == [*[[("quest", "decode")]] * 7, []]


def test_pages_are_shared_and_a_step_reads_less_than_a_fifth():
    length, row = 16384, quest().layers[3]
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, length, 8)
    method = row[0].build(length)
    chosen = method.select(q, k, Call.of(q, k, layer=3, memory={}))
    # pages of 32 for 256 + 16384 / 64 keys, one choice for each of the two key heads
    assert chosen.index.shape == (1, 2, 1, (256 + 256) // 32)
    # keys and values of the pages, and two keys' worth of bounds for each page of 32 keys and values
    share = (256 + 256) / length + 2 / (2 * 32)
    assert (7 * share + 1) / 8 < 0.2
