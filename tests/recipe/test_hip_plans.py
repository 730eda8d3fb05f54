"""The reader's HiP plans are what their recipe says."""

import pytest
import torch

from saccade.core.call import Call
from saccade.core.pattern import Full
from saccade.core.plan import Plan
from saccade.evaluate.presets import PLANS
from saccade.recipe import hip


@pytest.mark.parametrize("name", ["hip", "infinitehip"])
def test_the_shipped_plan_is_the_recipe(name):
    plan = getattr(hip, name)()
    assert Plan.load(PLANS / f"{name}.json") == plan
    assert [{a.method for a in row} for row in plan.layers[:7]] == [{name}] * 7
    assert bool(plan.layers[7]) == (name == "infinitehip")


@pytest.mark.parametrize(("name", "most"), [("hip", 0.21), ("infinitehip", 0.125)])
def test_reads_a_fifth_and_an_eighth_of_16k(name, most):
    """Pairs read and looked at in a prompt, over those of dense attention; a layer that is left out is dense."""
    length, total = 16384, 0.0
    q, k = torch.randn(2, 1, 1, length, 4).unbind(0)
    for layer, row in enumerate(getattr(hip, name)().layers):
        if not row:
            total += 1.0
        elif layer in (0, 1, 7):
            # layers 1 to 6 are alike
            method, call = row[0].build(length), Call.of(q, k, layer=layer)
            share = method.select(q, k, call).density(call) + method.estimate(call) / Full().pairs(call)
            total += share * (6 if layer == 1 else 1)
    assert total / 8 < most
