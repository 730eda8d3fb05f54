import ast
import re
from statistics import median

import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks.math_find import KINDS, MathFind


def solve(numbers, kind):
    if kind == "median":
        return median(numbers)
    numbers = list(numbers)
    pick = max if "largest" in kind else min
    for _ in range({"s": 1, "t": 2}[kind[0]] if "-" in kind else 0):
        worst = pick(numbers)
        numbers = [x for x in numbers if x != worst]
    return pick(numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_list_in_the_text_gives_the_answer(kind, tokenizer):
    for length in (800, 1203):
        sample = MathFind(kind=kind).sample(tokenizer, length, 1)
        text = tokenizer.decode(sample.ids)
        numbers = ast.literal_eval(re.search(r"\[[\d, ]+\]", text).group())
        assert float(sample.answer) == solve(numbers, kind)
        assert min(numbers) >= 0 and max(numbers) <= 99 and len(numbers) > 100


def test_ends_and_kinds_vary(bpe):
    samples = [MathFind().sample(bpe, 600, index) for index in range(14)]
    assert len({sample.question for sample in samples}) == len(KINDS)
    assert len({MathFind(kind="largest").sample(bpe, 600, index).answer for index in range(14)}) > 4


def test_scores_and_errors(bpe):
    task = MathFind(kind="median")
    sample = task.sample(bpe, 600, 0)
    assert task.score(f" {float(sample.answer)}, I think", sample) == 1
    assert task.score(f" {float(sample.answer) + 0.5}", sample) == 0
    with pytest.raises(InputError, match="unknown kind 'mode'"):
        MathFind(kind="mode")
