import re
from random import Random

import pytest

from saccade.evaluate.tasks.haystack import draw_names
from saccade.evaluate.tasks.niah_multikey import NiahMultikey

FACT = re.compile(r"The code of (\S+) is (\S+)\.")


@pytest.mark.parametrize("keys", [4, 10])
def test_only_the_asked_key_has_the_answer(keys, tokenizer):
    for index in range(3):
        sample = NiahMultikey(keys=keys).sample(tokenizer, 2500, index)
        facts = dict(FACT.findall(tokenizer.decode(sample.ids)))
        assert len(facts) == len(set(facts.values())) == keys
        assert facts[re.search(r"code of (\S+)\?", sample.question).group(1)] == sample.answer


@pytest.mark.parametrize("kind", ["pair", "uuid"])
def test_a_haystack_of_facts_never_repeats_the_key(kind, bpe):
    for index in range(5):
        sample = NiahMultikey(haystack="facts", keys=1, key=kind, value="uuid").sample(bpe, 3000, index)
        facts = FACT.findall(bpe.decode(sample.ids))
        key = re.search(r"code of (\S+)\?", sample.question).group(1)
        assert [said for name, said in facts if name == key] == [sample.answer]
        assert len(facts) == len(dict(facts)) > 30


def test_a_name_that_is_drawn_again_is_left_out():
    task = NiahMultikey(haystack="facts")
    keys, values = draw_names(Random(3), "pair", 4), ["1234567"]
    # the same lots draw the same names first
    lines = task._haystack(Random(3), 800, keys, values).lines
    assert len(lines) > 90 and not [line for line in lines for key in keys if f" {key} " in line]
