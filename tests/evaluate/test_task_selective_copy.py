import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks.selective_copy import SelectiveCopy


@pytest.mark.parametrize("count", [1, 8])
def test_dropping_the_dots_leaves_the_answer(count, tokenizer):
    for index in range(3):
        sample = SelectiveCopy(count=count).sample(tokenizer, 1200, index)
        body = tokenizer.decode(sample.ids).rsplit("\n\n", 1)[0].rsplit("\n", 1)[1]
        assert [part for part in body.split() if part != "."] == sample.answer.split()
        assert body.count(" .") > 300


def test_places_count(bpe):
    task = SelectiveCopy(count=4)
    sample = task.sample(bpe, 800, 0)
    assert task.score(" ".join(sample.answer.split()[::-1]), sample) == 0
    assert task.score(" ".join(sample.answer.split()[:2]), sample) == 0.5
    with pytest.raises(InputError, match="count"):
        SelectiveCopy(count=0)
