import re

from saccade.evaluate.tasks.niah_multivalue import NiahMultivalue

FACT = re.compile(r"One code of (\S+) is (\S+)\.")


def test_all_values_of_the_key_are_the_answers(tokenizer):
    for index in range(4):
        sample = NiahMultivalue().sample(tokenizer, 2000, index)
        facts = FACT.findall(tokenizer.decode(sample.ids))
        key = re.search(r"Look up (\S+) in", sample.question).group(1)
        assert {name for name, _ in facts} == {key}
        assert sorted(said for _, said in facts) == sorted(sample.answers) and len(facts) == 4


def test_each_value_counts_once(bpe):
    task = NiahMultivalue()
    sample = task.sample(bpe, 1000, 0)
    first, second, *_ = sample.answers
    assert task.score(f"{first}, {first}, {first}", sample) == 0.25
    assert task.score(f"{second} and {first}", sample) == 0.5
