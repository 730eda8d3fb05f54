"""The break-even measurement: its rows, its line between two lengths, and that its inputs are what heads are like."""

import pytest
import torch

from saccade.core.errors import InputError
from saccade.evaluate.bench import Case
from saccade.evaluate.crossover import break_even, crossover, structured


def test_rows():
    said = []
    found = crossover("streaming", lengths=(128, 256), repeat=1, done=said.append)
    assert [row["length"] for row in found["rows"]] == [128, 256] and len(said) == 2
    for row in found["rows"]:
        assert row["ms"] > 0 and row["speedup"] == pytest.approx(row["peer_ms"] / row["ms"], rel=0.1)
    assert found["tokens"] == break_even(found["rows"])


@pytest.mark.parametrize("method", ["tidal", "duo"])
def test_methods_without_a_choice_in_prefill_are_refused(method):
    with pytest.raises(InputError, match=method):
        crossover(method, lengths=(64,))


def test_only_the_last_crossing_counts():
    speeds = {100: 0.5, 200: 1.1, 400: 0.9, 800: 1.2, 1600: 3.0}
    tokens = break_even([{"length": n, "speedup": s} for n, s in speeds.items()])
    assert 400 < tokens < 800


def test_inputs_have_a_sink_and_a_near_past():
    q, k, _ = structured(Case(1024, 0.1))
    probs = torch.softmax(torch.ones(1024, 1024).tril().log() + q[0, 0] @ k[0, 0].T / 8, -1)[512:]
    far = probs[:, 4:300].mean()
    assert probs[:, :4].mean() > 4 * far
    near = torch.stack([probs[i, 512 + i - 60 : 512 + i].mean() for i in range(512)]).mean()
    assert near > 1.5 * far
