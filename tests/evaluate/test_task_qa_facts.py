import re

import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks.qa_facts import QaFacts

PERSON = re.compile(r"\n([A-Z]\w+ [A-Z]\w+) was born in (\w+) in \d{4}")
TOWN = re.compile(r"\n(\w+) lies on the river (\w+) and")


@pytest.mark.parametrize("hops", [1, 2])
def test_looking_things_up_gives_the_answer(hops, tokenizer):
    for index in range(4):
        sample = QaFacts(hops=hops).sample(tokenizer, 1800, index)
        text = tokenizer.decode(sample.ids)
        born, rivers = dict(PERSON.findall(text)), dict(TOWN.findall(text))
        asked = re.search(r"was (.+) born|where (.+) was born", sample.question)
        town = born[asked.group(1) or asked.group(2)]
        assert sample.answer == (town if hops == 1 else rivers[town])
        assert abs(len(born) - len(rivers)) <= 1 and len(born) > 8
        numbers = [int(n) for n in re.findall(r"Document (\d+):", text)]
        assert numbers == list(range(1, len(born) + len(rivers) + 1))


def test_the_depth_is_where_the_person_is_told_of(bpe):
    depths = []
    for index in range(12):
        sample = QaFacts().sample(bpe, 3000, index)
        text = bpe.decode(sample.ids)
        who = re.search(r"was (.+) born", sample.question).group(1)
        assert text.index(f"{who} was born") / len(text) == pytest.approx(sample.depth, abs=0.06)
        depths.append(sample.depth)
    assert max(depths) - min(depths) > 0.5


def test_part_of_a_sentence_counts(bpe):
    task = QaFacts()
    sample = task.sample(bpe, 900, 0)
    assert task.score(f"That was {sample.answer.upper()}.", sample) == 1
    assert task.score("Elsewhere", sample) == 0
    with pytest.raises(InputError, match="hops"):
        QaFacts(hops=3)
