import re
from itertools import groupby

from saccade.evaluate.tasks.number import Number


def test_ten_digits_in_at_most_five_runs(tokenizer):
    runs = []
    for index in range(20):
        sample = Number().sample(tokenizer, 900, index)
        assert re.findall(r"\d+", tokenizer.decode(sample.ids)) == [sample.answer] * 2
        assert len(sample.answer) == 10
        runs.append(len(list(groupby(sample.answer))))
    assert max(runs) <= 5 < sum(runs) / len(runs) + 2


def test_one_digit_too_many_is_wrong(bpe):
    task = Number()
    sample = task.sample(bpe, 900, 0)
    assert task.score(f" {sample.answer}", sample) == 1
    assert task.score(f" {sample.answer}{sample.answer[-1]}", sample) == 0
