"""The recall generator: what Zoology's has, and that a dictionary solves it."""

import pytest
import torch

from saccade.evaluate.tasks.recall import IGNORE, recall_batch


def draw(batch=50, length=40, pairs=3, vocab=16, seed=0, **more):
    return recall_batch(batch, length, pairs, vocab, torch.Generator().manual_seed(seed), **more)


def test_a_dictionary_answers_everything():
    ids, labels = draw()
    assert ids.shape == labels.shape == (50, 40)
    for row, want in zip(ids.tolist(), labels.tolist(), strict=True):
        known = dict(zip(row[0:6:2], row[1:6:2], strict=True))
        assert len(known) == len(set(known.values())) == 3
        assert all(1 <= k < 8 for k in known) and all(8 <= v < 16 for v in known.values())
        asked = [i for i, label in enumerate(want) if label != IGNORE]
        assert sorted(row[i] for i in asked) == sorted(known)
        assert all(want[i] == known[row[i]] and i >= 6 and i % 2 == 0 for i in asked)
        assert sum(t != 0 for t in row) == 9


def test_power_says_how_far_behind_a_key_returns():
    def distance(power):
        ids, labels = draw(batch=400, power=power)
        return (labels != IGNORE).nonzero()[:, 1].float().mean().item()

    near, even, far = distance(0.01), distance(1.0), distance(4.0)
    # even slots 6 ... 38: their middle is 22
    assert near < even - 5 and abs(even - 22) < 1 and far > even + 5


def test_seeds_and_bad_sizes():
    assert all(torch.equal(a, b) for a, b in zip(draw(), draw(), strict=True))
    assert not torch.equal(draw()[0], draw(seed=1)[0])
    for more in ({"length": 41}, {"pairs": 8}, {"length": 10}, {"pairs": 0}):
        with pytest.raises(ValueError, match="do not fit"):
            draw(**more)
