"""cover: the fewest entries that hold a share of the mass."""

import pytest
import torch

from saccade.kernels.cover import cover


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 0.999])
def test_cover_takes_the_fewest(share):
    torch.manual_seed(0)
    mass = torch.rand(5, 40, dtype=torch.float64)
    first = torch.zeros(40, dtype=torch.bool)
    first[[3, 20]] = True
    for given, least in ((None, 0), (first, 0), (None, 7)):
        for row, got in zip(mass.tolist(), cover(mass, share, first=given, least=least).tolist(), strict=True):
            taken = set() if given is None else {3, 20}
            order = sorted(set(range(40)) - taken, key=lambda j, row=row: -row[j])
            while sum(row[j] for j in taken) < share * sum(row) or len(taken) < least:
                taken.add(order.pop(0))
            assert {j for j in range(40) if got[j]} == taken


def test_everything_at_a_share_of_one_and_next_to_nothing_at_zero():
    mass = torch.tensor([[0.5, 0.0, 0.0, 1e-30, 0.5]])
    assert cover(mass, 1.0).all()
    assert not cover(mass, 0.0).any()
    assert cover(mass, 0.5).sum() == 1
    assert cover(mass, 0.9).tolist() == [[True, False, False, False, True]]
