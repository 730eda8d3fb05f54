"""AxFormer's claims: where a few words decide among many, the best few keys beat all of them, and a model that was
fine-tuned on few examples is better without most of its parts, which the loss on other examples finds."""

import random
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from saccade.core.call import Call
from saccade.core.pattern import Full
from saccade.core.plan import ModelShape, Plan
from saccade.evaluate.tasks.needle import Needle
from saccade.fit.axformer import Hard, hard_layers, plan_of, prune
from saccade.fit.parts import elements, without
from saccade.hf.attach import attach
from saccade.methods.controls.random import Random
from saccade.methods.select.streaming import Streaming
from saccade.methods.sparse.hard import HardAttention
from saccade.nn import Attention, Transformer
from saccade.reader import load

NOISE, WORDS, ASK, VOCAB = 40, 8, 56, 57  # distractors, keywords of each of two classes, the question
SHORT, LONG, KEYS, HEADS = 40, 512, 8, 4


class Under(Attention):
    """Dense weights whose queries read what `method` says, None = everything."""

    method = None

    def attend(self, q, k, v):
        call = Call.of(q, k)
        pattern = Full() if self.method is None else self.method.select(q, k, call)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=pattern.mask(call))


def texts(rows, length, rng):
    """Distractors, five keywords anywhere among them, and the question; the class is that of the most keywords."""
    ids = torch.randint(0, NOISE, (rows, length), generator=rng)
    kind = torch.randint(0, 2, (rows,), generator=rng)
    votes = torch.stack((kind, kind, kind, 1 - kind, kind), 1)
    word = NOISE + votes * WORDS + torch.randint(0, WORDS, votes.shape, generator=rng)
    at = torch.rand(rows, length - 1, generator=rng).topk(votes.shape[1]).indices
    ids.scatter_(1, at, word)
    ids[:, -1] = ASK
    return ids, kind


def draw(seed, rows, length=SHORT):
    return texts(rows, length, torch.Generator().manual_seed(seed))


def fresh(seed, layers, mlp_width):
    torch.manual_seed(seed)
    model = Transformer(VOCAB, 32, [Under(32, HEADS, rope_base=1e12) for _ in range(layers)], mlp_width)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0 if p.ndim == 2 else 1.0)  # std 0.02 is for wide models
    return model


def tune(model, batch, steps=100, lr=5e-3):
    """Train on what `batch()` gives."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        ids, kind = batch()
        loss = F.cross_entropy(model.head(model.hidden(ids).y[:, -1])[:, :2], kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@cache
def trained(seed, layers=2):
    """A model that has seen new texts at every step."""
    model, rng = fresh(seed, layers, mlp_width=32), torch.Generator().manual_seed(seed)
    tune(model, lambda: texts(64, SHORT, rng))
    return model


@torch.no_grad()
def measure(model, data, methods=None):
    """Loss and share of right classes, where the layers read what their methods say."""
    for block, method in zip(model.blocks, methods or [None] * len(model.blocks), strict=True):
        block.layer.method = method
    ids, kind = data
    out = model.head(model.hidden(ids).y[:, -1])[:, :2]
    return F.cross_entropy(out, kind).item(), (out.argmax(-1) == kind).float().mean().item()


def right(model, methods, length, rows=64):
    return measure(model, draw(99, rows, length), methods)[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_a_few_words_decide_among_many_more_than_in_training(seed):
    model = trained(seed)
    best, lot, near = (
        HardAttention(budget=KEYS),
        Random(budget=KEYS, block_q=1, block_k=1),
        Streaming(sink=0, recent=KEYS),
    )
    assert right(model, (None, None), SHORT) > 0.95
    # measured with three seeds: 0.91 to 1.0, against 0.41 to 0.59 for the others, where a coin has 0.5
    assert right(model, (best, best), LONG) > 0.8
    for others in ((None, None), (lot, lot), (near, near), (None, best)):
        assert right(model, others, LONG) < 0.72, others


@pytest.mark.slow
def test_the_search_finds_the_layers_that_must_read_few_keys():
    model, shape = trained(2, layers=4), ModelShape(4, HEADS, HEADS)

    def under(plan, data):
        return measure(model, data, [row[0].build() if row else None for row in plan.layers])

    def layers(chosen):
        return plan_of(shape, [Hard(layer, KEYS) for layer in chosen])

    subset, others, test = draw(11, 32, LONG), draw(12, 32, LONG), draw(13, 64, LONG)
    plan, found = hard_layers(shape, lambda p: under(p, subset)[0], budgets=[KEYS], held=lambda p: under(p, others)[0])
    chosen, rejected = ([one.layer for one in elements] for elements in (found.accepted, found.rejected))
    # the first layer reads the text and must be among them; the last ones need not
    assert 0 in chosen and len(chosen) < 4
    # measured with five seeds, two or three layers chosen: 0.96 to 1.0 in four, as in all layers; dense 0.43 to 0.57,
    # and so are the rejected ones. In the fifth hard attention helps nowhere, and the search says so: 3.5 to 3.5
    everywhere = under(layers(range(4)), test)[1]
    assert everywhere > 0.9 and under(plan, test)[1] > everywhere - 0.05
    assert max(under(layers(some), test)[1] for some in ((), rejected)) < 0.75
    # and it is not the subset alone that gains
    assert found.after < 0.2 * found.before and found.held[-1] < 0.2 * found.held[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_tuned_on_few_texts_a_model_is_better_without_most_of_its_parts(seed):
    model, rng = fresh(seed, layers=4, mlp_width=64), torch.Generator().manual_seed(seed)
    ids, kind = draw(1000 + seed, 64)

    def batch():
        at = torch.randint(0, len(ids), (64,), generator=rng)
        return ids[at], kind[at]

    tune(model, batch)
    subset, others, test = draw(2000 + seed, 256), draw(3000 + seed, 512), draw(4000 + seed, 1024)
    found = prune(model, lambda: measure(model, subset)[0], group=16, held=lambda: measure(model, others)[0])

    every = elements(model, group=16)
    gone = set(found.accepted) | {e for e in every if e.block in found.accepted}
    left = [e for e in every if e not in gone and e.kind in ("head", "neurons")]

    def lot(seed):
        """As many blocks, heads and groups as were found, any of them."""
        drawn, draws = [], random.Random(seed)
        for of in ("attention", "ffn", "head", "neurons"):
            there = [e for e in every if e.kind == of and e.block not in drawn]
            drawn += draws.sample(there, sum(e.kind == of for e in found.accepted))
        return drawn

    def at(removed):
        with without(model, removed):
            return measure(model, test)

    whole, pruned = at([]), at(found.accepted)
    by_lot = sum(at(lot(i))[1] for i in range(5)) / 5
    # measured with five seeds: of 16 heads and 16 groups of neurons 4 to 9 are left; 0.75 to 0.92 right become 0.83 to
    # 0.95, the loss falls to 0.27 to 0.42 of what it was; by lot 0.58 to 0.83 are right
    assert len(left) <= 12 and pruned[1] > whole[1] > by_lot and pruned[0] < 0.6 * whole[0]
    assert found.held[-1] < 0.6 * found.held[0] and len(found.overfitted) < len(found.accepted) / 2

    # sixteen texts are too few to choose by, and the second set knows. Measured with five seeds: its loss ends 0.09 to
    # 0.60 above the first one's, against -0.01 to 0.07, and in four the model is worse than by 256 texts
    few = prune(
        model,
        lambda: measure(model, (subset[0][:16], subset[1][:16]))[0],
        group=16,
        held=lambda: measure(model, others)[0],
    )
    assert few.held[-1] - few.after > found.held[-1] - found.after + 0.05
    assert at(few.accepted)[0] > pruned[0] + 0.02

    # trained on with the same texts, the smaller model is not the better one: ahead in two of five, from 0.08 less
    # to 0.04 more
    tuned = []
    for removed in ((), found.accepted):
        twin = deepcopy(model)
        with without(twin, removed):
            tune(twin, batch, lr=2e-3)
            tuned.append(measure(twin, test)[1])
    assert tuned[0] > whole[1] and abs(tuned[1] - tuned[0]) < 0.15


def looked_at(model, ids):
    """Queries and keys of every layer, in order."""
    seen = {}
    with attach(model, Plan.uniform(ModelShape.of(model))) as session, torch.inference_mode():
        session.watch = lambda one: seen.setdefault(one.call.layer, one)
        model(ids, past_key_values=session.cache())
    return [(seen[layer].q[:, :, -64:], seen[layer].k) for layer in sorted(seen)]


def recall(q, k, candidates):
    """Share of the truly best 16 keys among the best 16 of the candidates that signs let through."""
    call = Call.of(q, k)
    exact = HardAttention(budget=16).select(q, k, call).mask(call)
    signs = HardAttention(budget=16, candidates=candidates).select(q, k, call).mask(call)
    return float((exact & signs).sum() / exact.sum())


def test_signs_find_the_best_keys_better_after_training_but_for_the_layer_that_looks_up():
    reader, tokenizer = load()
    ids = torch.tensor(Needle(distractors=5).sample(tokenizer, 768, 1).ids)[None]
    drawn = [(torch.randn(1, 4, 64, 64), torch.randn(1, 2, ids.shape[1], 64)) for _ in range(8)]
    untrained = type(reader)(reader.config).eval()
    # measured with two texts; by lot 0.02 and 0.13:
    # sixteen by signs alone      reader 0.29 to 0.48, last layer 0.17 to 0.18; new weights 0.18 to 0.29; normal 0.26
    # an eighth of the keys       reader 0.71 to 0.88, last layer 0.52 to 0.54; new weights 0.53 to 0.74; normal 0.68
    for candidates, floor in ((16, 0.2), (ids.shape[1] // 8, 0.6)):
        read, new, normal = (
            [recall(q, k, candidates) for q, k in of]
            for of in (looked_at(reader, ids), looked_at(untrained, ids), drawn)
        )
        chance = sum(normal) / 8
        assert min(read[:-1]) > floor and sum(read[:-1]) / 7 > max(chance, sum(new) / 8) + 0.04
        assert read[-1] < chance - 0.03
