import re
from collections import Counter
from itertools import pairwise

import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks.common_words import CommonWords

ITEM = re.compile(r"(\d+)\. (\S+)")


def lists(text):
    """Every numbered list of a text."""
    found = []
    for number, word in ITEM.findall(text):
        if number == "1":
            found.append([])
        assert int(number) == len(found[-1]) + 1
        found[-1].append(word)
    return found


@pytest.mark.parametrize(("length", "often", "seldom"), [(2000, 6, 1), (3001, 6, 1), (9000, 30, 3)])
def test_counting_gives_the_answer(length, often, seldom, tokenizer):
    sample = CommonWords().sample(tokenizer, length, 1)
    shown, said, asked = lists(tokenizer.decode(sample.ids))
    counts = Counter(asked)
    assert sorted(counts.values(), reverse=True)[:10] == [often] * 10
    assert {n for _, n in counts.most_common()[10:]} == {seldom}
    assert {word for word, n in counts.items() if n == often} == set(sample.answers)
    # the worked example is right, and shares no word
    assert {word for word, _ in Counter(shown).most_common(10)} == set(said)
    assert not set(shown) & set(asked)


def test_words_are_shuffled(bpe):
    text = bpe.decode(CommonWords().sample(bpe, 3000, 0).ids)
    asked = lists(text)[-1]
    assert sum(a == b for a, b in pairwise(asked)) < len(asked) / 8


def test_errors():
    with pytest.raises(InputError, match="often 3 > seldom 3"):
        CommonWords(often=3)
    with pytest.raises(InputError, match="common"):
        CommonWords(common=0)
