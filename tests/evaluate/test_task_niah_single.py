import re

import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks.niah_single import NiahSingle

FACT = re.compile(r"The code of (\S+) is (\S+)\.")


@pytest.mark.parametrize("haystack", ["noise", "books", "facts"])
@pytest.mark.parametrize("value", ["number", "pair", "hex", "uuid"])
def test_reading_the_facts_gives_the_answer(haystack, value, tokenizer):
    for index in range(2):
        sample = NiahSingle(haystack=haystack, value=value).sample(tokenizer, 1600, index)
        facts = FACT.findall(tokenizer.decode(sample.ids))
        key = re.search(r"code of (\S+)\?", sample.question).group(1)
        assert [said for name, said in facts if name == key] == [sample.answer]
        assert len(facts) == 1 if haystack != "facts" else len(facts) > 12


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("haystack", ["noise", "books", "facts"])
def test_it_stands_at_its_depth(haystack, depth, bpe):
    sample = NiahSingle(haystack=haystack, depth=depth).sample(bpe, 4000, 1)
    text = bpe.decode(sample.ids)
    assert text.index(sample.answer) / len(text) == pytest.approx(depth, abs=0.06)


def test_errors_say_what_is_known():
    for options, said in (
        ({"haystack": "essay"}, "known are noise, books, facts"),
        ({"key": "word"}, "known are pair, numbered, hex, uuid"),
        ({"value": "word"}, "known are number, pair, hex, uuid"),
        ({"keys": 0}, "keys must be at least 1"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"keys": 41}, "more than 40 facts"),
    ):
        with pytest.raises(InputError, match=said):
            NiahSingle(**options)
