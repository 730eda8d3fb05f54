import re

import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks.passkey import Passkey


def test_the_only_number_is_the_answer(tokenizer):
    for index in range(5):
        sample = Passkey().sample(tokenizer, 1500, index)
        found = re.findall(r"\d+", tokenizer.decode(sample.ids))
        assert found == [sample.answer] * 2
        assert len(sample.answer) == 5


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_it_stands_at_its_depth(depth, bpe):
    text = bpe.decode(Passkey(depth=depth).sample(bpe, 4000, 0).ids)
    assert text.index(" code of the gate is") / len(text) == pytest.approx(depth, abs=0.03)


def test_depths_are_spread(bpe):
    depths = [Passkey().sample(bpe, 600, index).depth for index in range(40)]
    assert min(depths) < 0.15 and max(depths) > 0.85 and 0.3 < sum(depths) / 40 < 0.7


def test_the_first_number_counts_digit_by_digit(bpe):
    task = Passkey()
    sample = task.sample(bpe, 600, 0)
    key = sample.answer
    for said, score in ((f" {key}.", 1), (f"It is {key}, not 1", 1), (f"1 {key}", 0), (f"{key}1", 0), (key[:4], 0)):
        assert task.score(said, sample) == score
    with pytest.raises(InputError, match="depth=-1"):
        Passkey(depth=-1)
