"""The reader's Quest plan is what its recipe says, and reads what it may."""

import torch

from saccade.core.call import Call
from saccade.core.plan import Plan
from saccade.evaluate.presets import PLANS
from saccade.recipe.quest import quest


def test_the_shipped_plan_is_the_recipe():
    plan = quest()
    assert Plan.load(PLANS / "quest.json") == plan
    assert [[(a.method, a.phase, a.args["block_k"]) for a in row] for row in plan.layers] == [
        *[[("quest", "decode", 16)]] * 7,
        [("quest", "decode", 4)],
    ]


def test_pages_are_shared_and_a_sixteenth_of_the_keys():
    length, row = 16384, quest().layers[7]
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, length, 8)
    chosen = row[0].build(length).select(q, k, Call.of(q, k, layer=7, memory={}))
    # pages of 4 for 256 + 16384 / 16 keys, one choice for each of the two key heads
    assert chosen.index.shape == (1, 2, 1, (256 + 1024) // 4)
