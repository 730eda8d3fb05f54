import math
import re
from collections import Counter

import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks.frequent_words import FrequentWords, zeta


def coded_words(text):
    # what fills the rest stands on lines before
    words = text.rsplit("\n\n", 1)[0].rsplit("\n", 1)[1].split(" ")
    assert all(re.fullmatch(r"[a-z]{6}|\.\.\.", word) for word in words)
    return words


@pytest.mark.parametrize("length", [1000, 2500, 6000])
def test_counting_gives_the_answer(length, tokenizer):
    for index in range(2):
        task = FrequentWords()
        sample = task.sample(tokenizer, length, index)
        counts = Counter(coded_words(tokenizer.decode(sample.ids)))
        ranked = [word for word, _ in counts.most_common(5)]
        assert ranked[0] == "..." and tuple(ranked[1:4]) == sample.answers
        # the power law, to the word
        for rank, word in enumerate(ranked[1:4], 2):
            assert counts[word] in (counts["..."] // rank**2, (counts["..."] + 1) // rank**2)


def test_zeta_by_brute_force():
    for alpha in (1.5, 2.0, 3.5):
        terms = 200_000
        brute = math.fsum(k**-alpha for k in range(1, terms)) + terms ** (1 - alpha) / (alpha - 1)
        assert zeta(alpha) == pytest.approx(brute, abs=2e-5)


def test_errors(bpe):
    with pytest.raises(InputError, match="alpha"):
        FrequentWords(alpha=1.0)
    # so steep that all ranks but the first never come
    with pytest.raises(InputError, match="ranks apart"):
        FrequentWords(alpha=9.0).sample(bpe, 1000, 0)
