import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks.copy import Copy


@pytest.mark.parametrize(("count", "cue"), [(8, 3), (5, 1)])
def test_what_followed_the_cue_is_the_answer(count, cue, tokenizer):
    lags = []
    for index in range(6):
        sample = Copy(count=count, cue=cue).sample(tokenizer, 1500, index)
        text, again = tokenizer.decode(sample.ids).rsplit("\n\n", 1)
        assert again == sample.question and len(again.split()) == cue
        row = f"{again} {sample.answer}"
        assert text.count(row) == 1 and len(row.split()) == count
        at = text.index(row)
        lags.append(len(text) - at)
    # a fixed distance back would be of no use
    assert max(lags) > 2 * min(lags)


def test_places_count(bpe):
    task = Copy()
    sample = task.sample(bpe, 900, 0)
    words = sample.answer.split()
    assert task.score(" ".join([*words[:3], "no", *words[4:]]), sample) == pytest.approx(4 / 5)
    assert task.score(" ".join(words[1:]), sample) == 0
    for options in ({"cue": 0}, {"cue": 8}, {"depth": 2}):
        with pytest.raises(InputError, match="Copy"):
            Copy(**options)
