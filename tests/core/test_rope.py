"""Rope against complex numbers in float64, and against what transformers' models store."""

import pytest
import torch

from saccade.core.errors import InputError
from saccade.core.rope import Rope


def by_complex_numbers(t, positions, frequencies, interleaved):
    out = t.clone()
    half = len(frequencies)
    for i, w in enumerate(frequencies):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        z = torch.complex(t[..., a], t[..., b]) * torch.exp(1j * w * positions)
        out[..., a], out[..., b] = z.real, z.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "positions", [torch.arange(7), torch.randint(0, 99, (2, 1, 7)), torch.randint(0, 9, (1, 3, 7))]
)
def test_turns_pairs_as_complex_numbers(interleaved, positions):
    frequencies = torch.rand(4, dtype=torch.float64)
    t = torch.randn(2, 3, 7, 11, dtype=torch.float64)
    rope = Rope(frequencies, interleaved)
    want = by_complex_numbers(t, positions.double(), frequencies, interleaved)
    torch.testing.assert_close(rope(t, positions), want)
    torch.testing.assert_close(rope(want, positions, inverse=True), t)
    assert torch.equal(rope(t, positions)[..., 8:], t[..., 8:])


def test_products_depend_on_distance_only():
    rope = Rope(torch.rand(8, dtype=torch.float64))
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    near, far = ((rope(q, torch.tensor([a + 5])) * rope(k, torch.tensor([a]))).sum() for a in (0, 1000))
    torch.testing.assert_close(near, far)


def test_too_narrow_a_head():
    with pytest.raises(InputError, match=r"D >= 8.*\[1, 1, 2, 6\]"):
        Rope(torch.ones(4))(torch.zeros(1, 1, 2, 6), torch.arange(2))
