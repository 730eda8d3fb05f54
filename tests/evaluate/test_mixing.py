import pytest
import torch

from saccade.core.errors import PlanError
from saccade.evaluate.mixing import mixing, untrained
from saccade.methods.base import Layer, Output


class Shift(Layer):
    """y_i depends on x_{i-1} and twice as much on x_i."""

    def forward(self, x, state=None):
        before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return Output(2 * x + before)


def test_measures_what_the_layer_does():
    found = mixing(Shift(), 5, width=8)
    expected = torch.eye(5) + 0.5 * torch.ones(4).diag(-1)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["lightning", "routing"])
def test_untrained_layers_are_causal_and_seeded(name):
    found = mixing(untrained(name, {}), 24)
    assert torch.equal(found, mixing(untrained(name, {}), 24))
    assert found.diagonal().gt(0).all()
    assert found.isfinite().all()


def test_unknown_argument_names_the_known():
    with pytest.raises(PlanError, match="clusters"):
        untrained("routing", {"cluster": 3})
    with pytest.raises(PlanError, match="routing"):
        untrained("routing", {"clusters": 0})
