"""DuoAttention, MoA, RazorAttention on the reader: do the heads that each one finds matter more than others?

Every claim is compared at equal cost. The reader answers from 512 or 1024 tokens, far less than it can read, so that a
test takes seconds; windows are cut down in proportion.
"""

import json
from functools import cache
from itertools import pairwise

import pytest
import torch

from saccade import Assign, Plan, attach
from saccade.evaluate.tasks.needle import Needle
from saccade.fit.published import from_gates
from saccade.fit.razor import plan_of, score_heads
from saccade.reader import load
from saccade.reader.books import DATA, HELD_OUT, held_out

LAYERS, KEY_HEADS = 8, 2


@pytest.fixture(scope="module")
def reader():
    return load()


@cache
def asked(tokenizer, length, depths):
    """Prompts with a fact at each depth, and the tokens of their answers."""
    found = []
    for i, depth in enumerate(depths):
        sample = Needle(depth=depth).sample(tokenizer, length, i, seed=3)
        answer = tokenizer(f" {sample.answer}", add_special_tokens=False)["input_ids"]
        found.append((torch.tensor([sample.ids]), torch.tensor([answer])))
    return found


def exact(reader, plan, length, depths):
    """Share of the answers that are right to the last token, after prompts that were read under the plan."""
    model, tokenizer = reader
    with attach(model, plan) as session, torch.no_grad():
        hits = []
        for ids, answer in asked(tokenizer, length, depths):
            held = session.cache(length)
            first = model(ids, past_key_values=held, logits_to_keep=1).logits
            rest = model(answer[:, :-1], past_key_values=held).logits
            hits.append(bool((torch.cat((first, rest), 1).argmax(-1) == answer).all()))
    return sum(hits) / len(hits)


def loss(model, plan, ids, cuts):
    """Mean loss of the tokens from the first cut on, fed in pieces that end at the cuts."""
    with attach(model, plan) as session, torch.no_grad():
        held, outs = session.cache(ids.shape[1]), []
        for a, b in pairwise((0, *cuts, ids.shape[1])):
            outs.append(model(ids[:, a:b], past_key_values=held).logits)
    logits = torch.cat(outs, 1)[0, cuts[0] - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, cuts[0] :]))


def by_head(model, method, args):
    """A cache plan with arguments for each (layer, key head); None = keeps everything."""
    rows = [
        [Assign((g,), method, args(layer, g), "cache") for g in range(KEY_HEADS) if args(layer, g) is not None]
        for layer in range(LAYERS)
    ]
    return Plan.per_head(model, rows)


def shuffled(values, seed):
    return [values[i] for i in torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()]


def test_duo_learned_order_of_heads_against_random_and_reversed(reader):
    """Three quarters of the key heads stream, so that 4 of 16 keep everything: which four decides."""
    gates = [gate for row in json.loads((DATA / "plans" / "duo-gates.json").read_text()) for gate in row]

    def answers(order):
        table = [order[layer * KEY_HEADS : (layer + 1) * KEY_HEADS] for layer in range(LAYERS)]
        plan = from_gates(table, reader[0], sparsity=0.75, sink=16, recent=48)
        return exact(reader, plan, 512, (0.2, 0.4, 0.6))

    assert answers(gates) == 1.0
    assert answers([1 - g for g in gates]) == 0.0
    assert sum(answers(shuffled(gates, seed)) for seed in range(4)) / 4 <= 0.5


def test_moa_fitted_rules_against_a_uniform_window_and_random_rules(reader):
    """A quarter of the keys on average in all plans: the shipped rules, one span for all, the rules for other heads."""
    length, depths = 1024, (0.3, 0.6)
    spans, slopes = [length] * LAYERS * KEY_HEADS, [1.0] * LAYERS * KEY_HEADS
    for layer, row in enumerate(Plan.load(DATA / "plans" / "moa.json").layers):
        for assign in row:
            for g in assign.heads:
                rule = assign.args["span"]
                spans[layer * KEY_HEADS + g] = int(rule["base"] + rule["slope"] * length)
                slopes[layer * KEY_HEADS + g] = rule["slope"]
    # some heads do not need more of a longer text, others need all of it
    assert sum(s <= 0.125 for s in slopes) >= 8 and max(slopes) == 1.0

    def answers(spans):
        sizes = {"sink": 8, "least": 16, "block": 16}
        plan = by_head(reader[0], "moa", lambda layer, g: {"span": spans[layer * KEY_HEADS + g], **sizes})
        return exact(reader, plan, length, depths)

    mean = sum(spans) // len(spans)
    assert mean <= 0.25 * length
    assert answers(spans) == 1.0
    assert answers([mean] * len(spans)) == 0.0
    assert sum(answers(shuffled(spans, seed)) for seed in range(4)) / 4 <= 0.25


@pytest.fixture(scope="module")
def scores(reader):
    return score_heads(reader[0], period=128, repeats=3, seed=1)


def test_razor_masking_the_low_scored_heads_keeps_a_repeat_and_masking_the_best_destroys_it(reader, scores):
    """150 random tokens twice; windows of 36 tokens for the 14 key heads with the least score, or for the best 2."""
    model = reader[0]
    best = scores.induction.view(LAYERS, KEY_HEADS, -1).amax(2).flatten()
    order = best.argsort(descending=True).tolist()
    # few heads stand out
    assert best[order[1]] > 0.8 and best[order[2]] < 0.1
    ids = torch.randint(410, 4096, (150,), generator=torch.Generator().manual_seed(9)).repeat(2)[None]

    def second_copy(windowed):
        near = {"sink": 4, "recent": 32}
        plan = by_head(model, "duo", lambda layer, g: near if layer * KEY_HEADS + g in windowed else None)
        return loss(model, plan, ids, [151])

    whole = second_copy([])
    assert second_copy(order[2:]) < whole + 0.1
    assert second_copy(order[:2]) > whole + 10


def test_razor_compensation_token_narrows_the_gap_to_dense_on_a_book(reader, scores):
    """The loss of 192 tokens of book text behind 600, in steps of 16, with buffers of 32 tokens."""
    model, tokenizer = reader
    gaps = {True: 0.0, False: 0.0}
    for book in HELD_OUT:
        text = tokenizer(held_out(book)[200_000:206_000], add_special_tokens=False)["input_ids"]
        ids, cuts = torch.tensor([text[:792]]), range(600, 792, 16)
        dense = loss(model, Plan.uniform(model), ids, cuts)
        for compensate in gaps:
            sizes = {"sink": 4, "least": 32, "ratio": 1000, "slack": 0, "compensate": compensate}
            gaps[compensate] += loss(model, plan_of(model, scores, **sizes), ids, cuts) - dense
    assert 0 < gaps[True] < 0.7 * gaps[False]
