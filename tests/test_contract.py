"""One table, every method: see saccade.testing."""

from saccade.testing import every_method


@every_method
def test_contract(method, check):
    check(method)
