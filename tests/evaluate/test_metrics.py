import pytest

from saccade.evaluate.metrics import mean_score, wilson


@pytest.mark.parametrize("hits, n", [(0, 1), (0, 50), (1, 2), (7, 10), (50, 50)])
def test_wilson_solves_its_equation(hits, n):
    # the ends p are where the observed share lies exactly z standard errors of p away
    z = 1.959963984540054
    for end in wilson(hits, n):
        assert (hits / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-12)


def test_wilson_ends_are_exact_at_none_and_all():
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0


@pytest.mark.parametrize("hits, n", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses(hits, n):
    with pytest.raises(ValueError, match="wilson"):
        wilson(hits, n)


def test_mean_of_part_scores():
    found = mean_score([0.5, 1.0])
    assert (found.score, found.n) == (0.75, 2)
    assert found.low < 0.75 < found.high
