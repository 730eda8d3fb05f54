import math

import pytest
import torch

from saccade.core.errors import InputError
from saccade.evaluate.generate import serving
from saccade.evaluate.tasks.copy_perplexity import CopyPerplexity


@pytest.mark.parametrize("depth", [None, 0.0, 1.0])
def test_the_end_stands_in_the_text_before(depth, tokenizer):
    task = CopyPerplexity(count=60, depth=depth)
    lags = set()
    for index in range(4):
        sample = task.sample(tokenizer, 700, index)
        assert len(sample.ids) == 700
        body, copy = sample.ids[:-60], sample.ids[-60:]
        starts = [i for i in range(len(body) - 59) if body[i : i + 60] == copy]
        special = len(tokenizer("")["input_ids"])
        want = special + int(sample.depth * (640 - special - 60))
        assert starts == [want]
        lags.add(640 - want)
    assert len(lags) == (4 if depth is None else 1)


def test_bits_by_brute_force(tiny):
    task = CopyPerplexity(count=40, cue=6)
    sample = task.sample(tiny.tokenizer, 300, 0)
    with serving(tiny, None) as cache:
        found = task.run(tiny, cache, sample)
    ids = sample.ids
    with torch.inference_mode():
        chances = tiny.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def bits(first, last):
        nats = -sum(float(chances[i - 1, ids[i]]) for i in range(first, last))
        return nats / math.log(2) / len(tiny.tokenizer.decode(ids[first:last]).encode())

    assert found.score == pytest.approx(bits(266, 300), rel=1e-4)
    assert found.parts == pytest.approx({"prefill": bits(266, 283), "decode": bits(283, 300)}, rel=1e-4)


def test_errors(bpe):
    for options in ({"cue": 0}, {"cue": 127}, {"depth": 2}):
        with pytest.raises(InputError, match="CopyPerplexity"):
            CopyPerplexity(**options)
    with pytest.raises(InputError, match="twice"):
        CopyPerplexity().sample(bpe, 256, 0)
