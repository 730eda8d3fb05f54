import re

import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks.mrcr import Mrcr, sentences

ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
TURN = re.compile(r"Q: One (\w+) on the (\S+), please\.\nA: (.+)\n")


@pytest.mark.parametrize("needles", [1, 2, 4])
def test_reading_the_dialogue_gives_the_answer(needles, tokenizer):
    for index in range(4):
        sample = Mrcr(needles=needles).sample(tokenizer, 2000, index)
        turns = TURN.findall(tokenizer.decode(sample.ids))
        mark, ordinal, form, topic = re.search(
            r"Say (\w{10}), and .* the (\w+) (\w+) on the (\S+)\.\n", sample.question
        ).groups()
        said = [answer for what, about, answer in turns if (what, about) == (form, topic)]
        assert len(said) == needles and len(set(said)) == needles
        assert sample.answer == f"{mark} {said[ORDINALS.index(ordinal)]}"
        # the form or the topic alone does not tell
        assert len(turns) > needles + 3


def test_the_mark_comes_first_or_nothing_counts(bpe):
    task = Mrcr(ordinal=2)
    sample = task.sample(bpe, 2000, 0)
    mark, text = sample.answer.split(" ", 1)
    assert task.score(text, sample) == 0
    assert task.score(f"{text} {mark}", sample) == 0
    # two thirds of 2 * same / all: "abcd" against "abcdefgh" is 8/12
    half = text[: len(text) // 2]
    assert task.score(f"{mark} {half}", sample) == pytest.approx(2 * len(half) / (len(half) + len(text)), abs=0.02)
    assert task.score(mark, sample) == 0
    assert "the second" in sample.question


def test_sentences_are_plain_and_errors_said():
    found = sentences()
    assert len(found) == len(set(found)) > 1000
    assert all(40 <= len(text) <= 100 and "\n" not in text and ":" not in text for text in found)
    for options in ({"needles": 0}, {"ordinal": 3}, {"ordinal": 0}):
        with pytest.raises(InputError, match="needles"):
            Mrcr(**options)
