"""Why some prefill methods answer on the bundled reader and others do not: one row of the last 64 asks, in one layer.

The reader looks a fact up in its last layer, and in the prompt only the last token does. A method reads the fact there
if that one row can make itself heard among the rows that choose together with it.
"""

import pytest
import torch

from saccade.core.plan import ModelShape
from saccade.evaluate.presets import preset
from saccade.evaluate.tasks.needle import Needle
from saccade.hf.attach import attach
from saccade.kernels.scores import pooled_scores
from saccade.methods.select.xattention import antidiagonal_mass
from saccade.reader import load

LENGTH, LAYER, HEADS = 4096, 7, (1, 2, 3)


@pytest.fixture(scope="module", params=[0, 3])
def asked(request):
    """One question's last layer under dense attention: its call, queries, keys, and the facts' keys."""
    reader, tokenizer = load()
    sample = Needle().sample(tokenizer, LENGTH, request.param, seed=5)
    seen = {}
    with attach(reader, preset("dense", reader, LENGTH)) as session, torch.inference_mode():
        session.watch = lambda one: seen.setdefault(one.call.layer, one)
        reader(torch.tensor([sample.ids]), past_key_values=session.cache(), logits_to_keep=1)
    one = seen[LAYER]
    N = one.call.shape.N
    keys = one.k[0].repeat_interleave(2, 0)
    rows = torch.arange(N - 64, N)
    scores = one.q[0, :, rows] @ keys.mT * one.call.softmax_scale(64)
    probs = scores.masked_fill(torch.arange(N) > rows[:, None], -float("inf")).softmax(-1)
    text = "".join(tokenizer.decode([i]) for i in sample.ids)
    ends = torch.tensor([len(tokenizer.decode([i])) for i in sample.ids]).cumsum(0)
    at = text.index(sample.answer)
    # the sentence up to the answer: the answer's tokens and the twenty before
    fact = ((ends > at - 60) & (ends <= at + len(sample.answer))).nonzero().flatten()
    return one.call, one.q, one.k, probs, fact


def kept(method, asked):
    """The last row's weight on the fact that a method's preset reads, each head that looks up."""
    call, q, k, probs, fact = asked
    plan = preset(method, ModelShape(8, 4, 2), LENGTH)
    pattern = plan.phase(LAYER, "prefill")[0].build(LENGTH).select(q, k, call)
    mask = pattern.mask(call, torch.tensor([call.shape.N - 1]))[0, :, 0]
    return (probs[:, -1] * mask)[:, fact].sum(-1)[list(HEADS)]


def rank(scores, fact, blocks=64):
    """Where the block with most of the fact stands among all, 0 = best, for the luckiest of the heads that look up."""
    own = fact.div(blocks, rounding_mode="floor").mode().values
    return int((scores[list(HEADS)] > scores[list(HEADS), own, None]).sum(-1).min())


def test_one_row_asks_and_all_heads_of_the_lookup_agree(asked):
    _, _, _, probs, fact = asked
    wants = probs[:, :, fact].sum(-1)[list(HEADS)]
    assert (wants[:, -1] > 0.7).all()
    assert (wants[:, :-1] > 0.5).sum() == 0


def test_columns_and_whole_rows_hear_it(asked):
    for method in ("trishape", "minference", "flexprefill", "oracle"):
        found = kept(method, asked)
        assert (found > 0.5).sum() >= 2, (method, found)


def test_means_and_antidiagonals_do_not(asked):
    call, q, k, _, fact = asked
    for method in ("pooled", "xattention", "streaming"):
        assert kept(method, asked).max() < 0.2, method
    # not for want of budget: the fact's block stands in the worse half
    assert rank(pooled_scores(q, k, 64, 64)[0, :, -1], fact) > 32
    assert rank(antidiagonal_mass(q, k, call, 16, 64)[0, :, -1], fact) > 16
