"""The model that lm-evaluation-harness asks: its own class for transformers, reading under an attached plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from saccade.core.errors import UnsupportedError
from saccade.evaluate.model import Loaded
from saccade.hf.attach import Session


class Attached(HFLM):
    """lm-evaluation-harness's HFLM (Gao et al., code: EleutherAI/lm-evaluation-harness) on a model that has a plan.

    Prompts, truncation, stop texts and generation are the harness's own; each batch generates with a new
    `session.cache()`. What is scored is what would be generated: a context is read in one prefill, and its
    continuations token by token behind it, each in a fork of the cache, so that decoding and cache policies show. (HFLM
    reads context and continuation in one pass, which for dense attention gives the same numbers.) Texts that are scored
    as a whole, for perplexity, are read in one pass as there.

    Args:
        loaded: the model, which the session is attached to.
        session: from `attach`.
        batch_size: prompts that generate together; log-likelihoods are computed one context at a time.
        max_length: tokens of context and answer; None = what the model's config says.

    Raises:
        UnsupportedError: a batch size that the harness is to find by trying.
    """

    def __init__(self, loaded: Loaded, session: Session, batch_size: int = 1, max_length: int | None = None) -> None:
        if not isinstance(batch_size, int):
            raise UnsupportedError(f"lm-eval: batch_size must be a whole number under a plan, got {batch_size!r}")
        super().__init__(loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, max_length=max_length)
        self.session = session

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        cache = self.session.cache(context.shape[1])
        return super()._model_generate(context, max_length, stop, past_key_values=cache, **options)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each (texts or None, context tokens, continuation tokens): log-probability, and is it the greedy one?"""
        found: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring continuations")
        # requests of one context, in whatever order they came
        groups: dict[tuple[int, ...], list[int]] = {}
        for at, (texts, context, continuation) in enumerate(requests):
            if texts is None:
                found[at] = self._scored(self._whole(context, continuation), continuation)
                bar.update()
            else:
                groups.setdefault(self._context(context, continuation), []).append(at)
        for context, members in groups.items():
            # answers that come again, and the many answers of one token, cost nothing more
            known: dict[tuple[int, ...], Tensor] = {}
            first, cache = self._read(context)
            for at in members:
                texts, _, continuation = requests[at]
                behind = tuple(continuation[:-1])
                if behind not in known:
                    known[behind] = self._steps(first, cache, behind)
                found[at] = self._scored(known[behind], continuation)
                self.cache_hook.add_partial("loglikelihood", texts, found[at])
                bar.update()
        bar.close()
        return [found[at] for at in range(len(requests))]

    def _context(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """What of a context is left before its continuation, cut from the left as HFLM cuts."""
        room = self.max_length + 1 - len(continuation)
        return tuple(context[-room:])

    def _whole(self, context: Sequence[int], continuation: Sequence[int]) -> Tensor:
        """Logits [n, vocabulary] of all tokens of a text, read in one pass."""
        ids = [*self._context(context, continuation), *continuation[:-1]]
        cache = self.session.cache(len(ids))
        return self._forward(ids, cache, len(continuation))

    def _read(self, context: Sequence[int]) -> tuple[Tensor, Any]:
        """Logits [1, vocabulary] behind a context, and its cache."""
        cache = self.session.cache(len(context))
        return self._forward(context, cache, 1), cache

    def _steps(self, first: Tensor, cache: Any, tokens: Sequence[int]) -> Tensor:
        """Logits [1 + n, vocabulary] from the end of a context on through n tokens, as decoding would meet them."""
        if not tokens:
            return first
        mine = cache.fork()
        return torch.cat([first, *(self._forward([token], mine, 1) for token in tokens)])

    def _forward(self, ids: Sequence[int], cache: Any, keep: int) -> Tensor:
        tokens = torch.tensor([list(ids)], device=self.device)
        return self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0]

    def _scored(self, logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
        ids = torch.tensor(list(continuation), device=logits.device)
        told = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype).gather(1, ids[:, None])
        return float(told.sum()), bool((logits.argmax(-1) == ids).all())
