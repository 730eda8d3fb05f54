import re

from saccade.evaluate.tasks.niah_multiquery import NiahMultiquery

FACT = re.compile(r"The code of (\S+) is (\S+)\.")


def test_answers_come_in_the_order_of_their_keys(tokenizer):
    for queries, keys in ((4, 4), (2, 6), (3, 1)):
        sample = NiahMultiquery(keys=keys, queries=queries).sample(tokenizer, 2000, 0)
        facts = dict(FACT.findall(tokenizer.decode(sample.ids)))
        asked = re.search(r"Look up (.+) in the", sample.question).group(1).replace(" and ", ", ").split(", ")
        assert [facts[key] for key in asked] == list(sample.answers)
        assert len(asked) == queries and len(facts) == max(keys, queries)


def test_needles_stand_at_different_depths(bpe):
    sample = NiahMultiquery().sample(bpe, 4000, 0)
    text = bpe.decode(sample.ids)
    places = sorted(text.index(answer) / len(text) for answer in sample.answers)
    assert len({round(place, 2) for place in places}) == 4
