"""Every planted fault is found, by a wrong number, and by nothing that fails without it."""

import pytest

from saccade.testing import CHECKS, instances
from saccade.testing.mutants import MUTANTS

PAIRS = [(name, check) for name, mutant in MUTANTS.items() for check in mutant.checks]


@pytest.mark.parametrize(("name", "check"), PAIRS, ids=[f"{name}-{check}" for name, check in PAIRS])
def test_found(name, check):
    mutant = MUTANTS[name]
    CHECKS[check](instances()[mutant.method])
    with mutant.plant(), pytest.raises(AssertionError):
        CHECKS[check](instances()[mutant.method])
    CHECKS[check](instances()[mutant.method])


def test_every_check_finds_something():
    assert {check for _, check in PAIRS} == set(CHECKS)
