"""The contract of every method, the inputs it runs on, and planted faults that it must find. Needs pytest.

For a method of your own:

    from saccade.testing import contract

    @contract({"mine": Mine(budget=48)})
    def test_contract(method, check):
        check(method)
"""

from __future__ import annotations

from saccade.testing.checks import CHECKS, contract
from saccade.testing.inputs import Feed, Stream, instances, run, stream

every_method = contract(instances())

__all__ = ["CHECKS", "Feed", "Stream", "contract", "every_method", "instances", "run", "stream"]
