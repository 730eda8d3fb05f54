"""Numbers that wait on a device: all come, once, in order, and nothing is read before they are asked for."""

import pytest
import torch

from saccade.hf import deferred
from saccade.hf.deferred import Deferred


def test_numbers_come_when_they_are_asked_for_and_once():
    waiting, found = Deferred(), []
    tensors = [torch.randn(3), torch.randint(-9, 9, (2, 2)), torch.rand(1, dtype=torch.double)[0], torch.ones(2) > 0]
    for t in tensors:
        waiting.add(t, found.append)
    assert found == []
    waiting.settle()
    assert found == [t.double().flatten().tolist() for t in tensors]
    waiting.settle()
    assert len(found) == 4


def test_a_number_that_is_known_does_not_wait():
    waiting, found = Deferred(), []
    waiting.add(2.5, found.append)
    assert found == [[2.5]]


def test_large_counts_stay_exact():
    waiting, found = Deferred(), []
    waiting.add(torch.tensor(2**53 - 1), found.append)
    waiting.add(torch.tensor(1.5), found.append)
    waiting.settle()
    assert found == [[2.0**53 - 1], [1.5]]


def test_not_too_many_wait(monkeypatch):
    monkeypatch.setattr(deferred, "MOST", 3)
    waiting, found = Deferred(), []
    for i in range(7):
        waiting.add(torch.tensor(float(i)), found.append)
    assert found == [[float(i)] for i in range(6)]


def test_a_value_that_is_not_there_is_not_read_early():
    # a meta tensor has no numbers at all
    waiting = Deferred()
    waiting.add(torch.zeros(2, device="meta"), list)
    with pytest.raises(NotImplementedError):
        waiting.settle()
