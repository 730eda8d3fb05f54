"""Associative recall (MQAR): key-value pairs, then some of the keys again; what was each one's value? For training."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # what cross_entropy leaves out


def recall_batch(
    batch: int,
    length: int,
    pairs: int,
    vocab: int,
    rng: torch.Generator,
    power: float = 1.0,
    passes: int = 1,
    noise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sequences `k1 v1 ... kP vP`, then zeros with each key once more; the label at a repeated key is its value.

    Multi-query associative recall of Zoology (Arora et al. 2023, arXiv 2312.04927, code: HazyResearch/zoology), drawn
    anew with torch's generator. Unlike the passages of the other tasks this is for models that are trained on it.

    Args:
        batch: sequences.
        length: tokens in each, even, at least 2 * pairs * (passes + 1).
        pairs: keys, all different; so are the values.
        vocab: 0 fills, keys are 1 ... vocab/2 - 1, values vocab/2 ... vocab - 1.
        rng: source of randomness.
        power: a key comes back in slot i = 1, 2, ... (of two tokens) behind the pairs with probability ~ i^(power-1);
            1.0 is uniform, Zoology's 0.01 puts most right behind the pairs.
        passes: how often the pairs are written before keys come back.
        noise: random tokens of the whole vocabulary instead of zeros.

    Shapes:
        -> ids [batch, length], labels [batch, length] with -100 where nothing is asked

    Raises:
        ValueError: pairs that do not fit in the length or the vocabulary.

    Example:
        >>> ids, labels = recall_batch(1, 16, pairs=2, vocab=12, rng=torch.Generator().manual_seed(0))
        >>> asked = labels != IGNORE
        >>> sorted(zip(ids[asked], labels[asked])) == sorted(zip(ids[0, :4:2], ids[0, 1:4:2]))
        True
    """
    context = 2 * pairs * passes
    if length % 2 or length < context + 2 * pairs or vocab // 2 - 1 < pairs or pairs < 1 or passes < 1:
        raise ValueError(
            f"recall: {pairs} pairs, {passes} times, do not fit in length {length} (even) and vocabulary {vocab}"
        )
    keys = 1 + torch.rand(batch, vocab // 2 - 1, generator=rng).topk(pairs).indices
    values = vocab // 2 + torch.rand(batch, vocab - vocab // 2, generator=rng).topk(pairs).indices
    slot = torch.arange(1, (length - context) // 2 + 1, dtype=torch.float64) ** (power - 1)
    at = context + 2 * torch.multinomial(slot.expand(batch, -1), pairs, generator=rng)
    ids = torch.zeros(batch, length, dtype=torch.long)
    if noise:
        ids = torch.randint(vocab, (batch, length), generator=rng)
    ids[:, :context] = torch.stack((keys, values), 2).flatten(1).repeat(1, passes)
    labels = torch.full_like(ids, IGNORE)
    return ids.scatter_(1, at, keys), labels.scatter_(1, at, values)
