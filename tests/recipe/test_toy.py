"""The toy that finds a passkey: its pages, and what it can and cannot do."""

import pytest
import torch

from saccade.recipe.toy import ANSWER, ASK, FACT, LENGTH, NOISE, TOLD, exact, pages, passkey_model


@pytest.mark.parametrize("told", [1, 7, None])
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0, None])
def test_a_page_is_noise_a_fact_and_a_question(told, at):
    page = pages(90, 40, torch.Generator().manual_seed(0), told, at)
    facts = (page >= FACT).sum(1)
    assert (facts == told).all() if told else (facts.min() >= 1 and facts.max() <= TOLD and len(facts.unique()) > 3)
    for row in page:
        slots = (row >= FACT).nonzero().flatten()
        assert slots.tolist() == list(range(int(slots[0]), int(slots[0]) + len(slots)))
        assert row[slots].unique().numel() == 1 and row[slots[0]] - FACT == row[-1] - ANSWER
        assert row[-2] == ASK and (row[:-2] < FACT)[row[:-2] < FACT].all()
        assert at != 0.0 or slots[0] == 0
        assert at != 1.0 or slots[-1] == 87
    noise = page[page < NOISE]
    assert len(noise) == 40 * 88 - int(facts.sum())
    # the fact may stand anywhere
    starts = (page >= FACT).int().argmax(1)
    assert at is not None or (starts.min() < 15 and starts.max() > 60)


def test_the_same_seed_draws_the_same_pages():
    a, b, c = (pages(30, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.slow
def test_right_within_the_trained_length_and_lost_beyond():
    """32 pages each: all right at 64 and 256 tokens, fewer than half at 2048."""
    model = passkey_model()
    assert model is passkey_model()
    rng = torch.Generator().manual_seed(5)
    for told in (1, TOLD):
        assert exact(model, pages(64, 32, rng, told)) == 1.0
        assert exact(model, pages(LENGTH, 32, rng, told)) == 1.0
        assert exact(model, pages(8 * LENGTH, 32, rng, told)) < 0.5
    page = pages(LENGTH, 8, rng, 4)
    assert exact(model, page, chunk=100) == exact(model, page, chunk=4096) == exact(model, page)
