import re

import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks.variable_tracking import VariableTracking

SET = re.compile(r"Set ([A-Z]{5}) to (\w+)\.")


def interpret(text):
    """Run the statements in their order; names that are not set yet are an error."""
    values = {}
    for name, given in SET.findall(text):
        assert name not in values
        values[name] = given if given.isdigit() else values[given]
    return values


@pytest.mark.parametrize("haystack", ["noise", "books"])
@pytest.mark.parametrize(("hops", "chains"), [(4, 1), (1, 1), (2, 3)])
def test_an_interpreter_finds_the_answers(hops, chains, haystack, tokenizer):
    for index in range(3):
        task = VariableTracking(hops=hops, chains=chains, haystack=haystack)
        sample = task.sample(tokenizer, 2000, index)
        values = interpret(tokenizer.decode(sample.ids))
        asked = re.search(r"come to (\d{5})", sample.question).group(1)
        assert [name for name, value in values.items() if value == asked] == list(sample.answers)
        # one more chain is the worked example's
        assert len(sample.answers) == hops + 1 and len(values) == (chains + 1) * (hops + 1)


def test_the_worked_example_is_right(bpe):
    text = bpe.decode(VariableTracking().sample(bpe, 2000, 0).ids)
    asked, said = re.search(r"come to (\d{5}) in the end\?.* are ([A-Z, ]+)\n", text).groups()
    values = interpret(text)
    assert said.split(", ") == [name for name, value in values.items() if value == asked]
    assert len(interpret(bpe.decode(VariableTracking(shots=0).sample(bpe, 2000, 0).ids))) == 5


def test_errors():
    for options, said in (({"hops": 0}, "hops"), ({"chains": 0}, "chains"), ({"haystack": "x"}, "noise, books")):
        with pytest.raises(InputError, match=said):
            VariableTracking(**options)
    with pytest.raises(InputError, match="shots"):
        VariableTracking(shots=-1)
