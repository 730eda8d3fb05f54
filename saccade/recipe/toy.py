"""A toy that finds a passkey: trained in seconds at length 256, to show what a method does beyond the trained length.

A page is noise in which one fact stands, told up to `TOLD` times in a row. At the end the page asks, and the next
token must be the fact's value. Within 256 tokens the model is always right; at eight times that length dense attention
is lost.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LENGTH = 256  # longest page that it is trained on
NOISE, VALUES, TOLD = 24, 32, 16
ASK, ANSWER, FACT = NOISE, NOISE + 1, NOISE + 1 + VALUES  # tokens: noise, the question, answers, facts
VOCAB = FACT + VALUES


def pages(length: int, rows: int, rng: torch.Generator, told: int | None = None, at: float | None = None) -> Tensor:
    """Pages whose last two tokens are the question and its answer: int64 [rows, length].

    Args:
        length: tokens of a page, question and answer included.
        rows: number of pages.
        rng: draws them.
        told: how many times in a row the fact stands there; None = 1 to 16, another number for each page.
        at: where it begins, 0 = at the start, 1 = just before the question; None = anywhere.

    Example:
        >>> page = pages(12, 1, torch.Generator().manual_seed(0), told=2, at=0.5)[0]
        >>> (page >= FACT).nonzero().flatten().tolist(), int(page[-2]) == ASK, int(page[4] - FACT == page[-1] - ANSWER)
        ([4, 5], True, 1)
    """
    body = length - 2
    page = torch.randint(0, NOISE, (rows, length), generator=rng)
    value = torch.randint(0, VALUES, (rows,), generator=rng)
    times = torch.randint(1, min(TOLD, body) + 1, (rows,), generator=rng) if told is None else torch.tensor(told)
    where = torch.rand(rows, generator=rng) if at is None else torch.full((rows,), at)
    start = (where * (body - times + (at is None))).long()[:, None]
    slot = torch.arange(length)
    inside = (slot >= start) & (slot < start + times.reshape(-1, 1))
    page = torch.where(inside, FACT + value[:, None], page)
    page[:, -2], page[:, -1] = ASK, ANSWER + value
    return page


@cache
def passkey_model(seed: int = 0, steps: int = 200, base: float = 1000.0) -> Any:
    """A `LlamaForCausalLM` of two layers, 4 query and 2 key heads of width 32, trained on `pages` up to 256 tokens.

    About ten seconds on one core. The model is kept and shared by all callers of a process: leave it as it is. With a
    rotary base of 1000 the slowest channels turn by 0.4 radians within 256 tokens and by 3 within 2048.

    Args:
        seed: of weights and pages.
        steps: of AdamW, half of them on pages of 64 tokens, half on pages of 256.
        base: of the rotary frequencies.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=32)
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).train()
        rng = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 5e-3 * min(1.0, (step + 1) / 20, max(0.03, 1.6 * (1 - step / steps)))
            page = pages(64, 32, rng) if step < steps // 2 else pages(LENGTH, 8, rng)
            last = model.model(page[:, :-1]).last_hidden_state[:, -1]
            F.cross_entropy(model.lm_head(last), page[:, -1]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def exact(model: Any, page: Tensor, cache: Any = None, chunk: int | None = None) -> float:
    """Share of pages whose answer is the model's first choice.

    Args:
        model: the model, with or without a plan attached.
        page: from `pages`, [rows, length].
        cache: `session.cache()`, or None for transformers' own.
        chunk: the page but its question is read in pieces of so many tokens, the question alone after them (decoding);
            None = everything in one call.
    """
    asked = page[:, :-1]
    ends = [asked.shape[1]] if chunk is None else [*range(chunk, asked.shape[1] - 1, chunk), asked.shape[1] - 1]
    ends, start, logits = [*ends, asked.shape[1]] if chunk is not None else ends, 0, None
    for end in ends:
        out = model(asked[:, start:end], past_key_values=cache, use_cache=chunk is not None or cache is not None)
        cache, logits, start = out.past_key_values, out.logits[:, -1], end
    assert logits is not None
    return (logits.argmax(-1) == page[:, -1]).float().mean().item()
