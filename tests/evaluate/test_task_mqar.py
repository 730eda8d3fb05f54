import pytest
import torch

from saccade.core.errors import InputError
from saccade.evaluate.tasks.mqar import TEST, TRAIN, Mqar, segments
from saccade.evaluate.tasks.recall import IGNORE


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_dictionary_gives_the_labels(passes, noise):
    sizes = ((64, 4, 30), (100, 8, 30))
    for (length, pairs, examples), segment in zip(
        sizes, segments(sizes, vocab=256, passes=passes, noise=noise), strict=True
    ):
        assert segment.ids.shape == segment.labels.shape == (examples, length) and segment.pairs == pairs
        context = 2 * pairs * passes
        for row, want in zip(segment.ids.tolist(), segment.labels.tolist(), strict=True):
            known = dict(zip(row[:context:2], row[1:context:2], strict=True))
            assert len(known) == len(set(known.values())) == pairs
            assert all(0 < k < 128 <= v < 256 for k, v in known.items())
            asked = [i for i, label in enumerate(want) if label != IGNORE]
            assert sorted(row[i] for i in asked) == sorted(known)
            assert all(i >= context and i % 2 == 0 and want[i] == known[row[i]] for i in asked)
            others = [row[i] for i in range(context, length) if i not in asked]
            assert any(others) == noise


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_follow_zoologys_power_law(power):
    # one pair in 22 tokens: ten slots, each with probability a * i^(a-1), normalised
    (segment,) = segments(((22, 1, 20_000),), vocab=64, power=power)
    at = (segment.labels != IGNORE).nonzero()[:, 1]
    found = torch.bincount((at - 2) // 2, minlength=10).double() / len(at)
    want = torch.tensor([power * i ** (power - 1) for i in range(1, 11)], dtype=torch.float64)
    assert found.numpy() == pytest.approx((want / want.sum()).numpy(), abs=0.015)


def test_noise_uses_the_whole_vocabulary():
    (segment,) = segments(((64, 1, 500),), vocab=128)
    rest = segment.ids[:, 2:][segment.labels[:, 2:] == IGNORE]
    assert torch.bincount(rest, minlength=128).min() > 0


def test_the_published_mixtures():
    assert [sum(n for *_, n in sizes) for sizes in (TRAIN, TEST)] == [180_000, 7000]
    assert all(4 * pairs <= length for length, pairs, _ in TRAIN + TEST)
    # the largest segment can be made
    (segment,) = segments(((1024, 256, 2),))
    assert int((segment.labels != IGNORE).sum()) == 512


def test_seeds_and_errors():
    sizes = ((64, 4, 5),)
    one, same, other = (next(segments(sizes, seed=seed)).ids for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(InputError, match="below the vocabulary"):
        next(segments(sizes, vocab=64))
    with pytest.raises(InputError, match="do not fit"):
        next(segments(sizes, passes=8))


@pytest.mark.parametrize("queries", [1, 4])
def test_the_text_answers_itself(queries, tokenizer):
    for index in range(3):
        task = Mqar(queries=queries)
        sample = task.sample(tokenizer, 900, index)
        text, asked = tokenizer.decode(sample.ids).rsplit("\n\n", 1)
        # what fills the rest stands on lines before
        known = dict(pair.split(" ") for pair in text.rsplit("\n", 1)[1].rstrip(";").split("; "))
        *shown, last = asked.split("; ")
        assert asked == sample.question and len(shown) == queries - 1
        assert known[last] == sample.answer
        assert all(known[key] == value for key, value in (pair.split(" ") for pair in shown))
        assert task.score(f" {sample.answer}; {last} 1", sample) == 1
        assert task.score(f" {sample.answer}1; ", sample) == 0


def test_bad_options():
    for options in ({"queries": 0}, {"key": "word"}, {"value": "word"}):
        with pytest.raises(InputError, match="Mqar"):
            Mqar(**options)
