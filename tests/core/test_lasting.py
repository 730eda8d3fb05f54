import inspect

import pytest
import torch

from saccade.core.lasting import lasting


@lasting
def made(count: int, fill: float = 0.0) -> torch.Tensor:
    """What it says."""
    return torch.full((count,), fill)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_what_is_made_can_be_written_in_any_mode(mode):
    with mode():
        kept = made(3, fill=2.0)
    assert not kept.is_inference() and not kept.requires_grad
    kept += 1
    with torch.inference_mode():
        kept += 1
    weight = torch.ones(3, requires_grad=True)
    (weight * kept).sum().backward()
    assert weight.grad.tolist() == kept.tolist() == [4.0] * 3


def test_the_callers_mode_is_what_it_was():
    for mode, inference, grad in ((torch.inference_mode, True, False), (torch.no_grad, False, False)):
        with mode():
            made(1)
            assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == (inference, grad)
            assert torch.zeros(1).is_inference() == inference
            with pytest.raises(RuntimeError, match="negative"):
                made(-1)
            assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == (inference, grad)


def test_gradients_go_through_where_they_are_wanted():
    double = lasting(lambda t: 2 * t)
    weight = torch.ones(2, requires_grad=True)
    double(weight).sum().backward()
    assert weight.grad.tolist() == [2.0, 2.0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not double(weight).requires_grad


def test_it_looks_like_the_function():
    assert made.__doc__ == "What it says." and list(inspect.signature(made).parameters) == ["count", "fill"]
