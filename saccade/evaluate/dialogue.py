"""Dialogues side by side: the first prompts are read at once, from then on each call of the model reads a token a row.

A row reads either the token that it has just generated or the next one of its next question. So rows never become
ragged, however long their questions and answers are, and a dialogue is the same computation alone and among others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from saccade.core.errors import InputError

if TYPE_CHECKING:
    from saccade.evaluate.model import Loaded


@dataclass(frozen=True)
class Ending:
    """When an answer has ended: with a token that ends the sequence, with a text, or at its longest.

    Args:
        tokenizer: makes text of tokens.
        ends: tokens that end the sequence; they are no part of the text.
        stop: text that ends the answer, with all that follows it; "" = none does.
        most: tokens of the longest answer, the one that ends it included.

    Raises:
        InputError: no token may be generated.
    """

    tokenizer: Any
    ends: frozenset[int] = frozenset()
    stop: str = "\n"
    most: int = 24

    def __post_init__(self) -> None:
        if self.most < 1:
            raise InputError(f"an answer needs max_new_tokens >= 1, got {self.most}")

    @classmethod
    def of(cls, loaded: Loaded, most: int = 24, stop: str = "\n") -> Ending:
        """How a model's answers end."""
        ends = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
        every = [] if ends is None else [ends] if isinstance(ends, int) else ends
        return cls(loaded.tokenizer, frozenset(every), stop, most)

    def reached(self, said: Sequence[int]) -> bool:
        """Does the last of these tokens end the answer?"""
        if said[-1] in self.ends or len(said) >= self.most:
            return True
        return bool(self.stop) and self.stop in self.tokenizer.decode(list(said))

    def text(self, said: Sequence[int]) -> str:
        """What was said, without what ended it."""
        text = self.tokenizer.decode([token for token in said if token not in self.ends])
        return (text.split(self.stop, 1)[0] if self.stop else text).strip()


class Dialogue:
    """One row: what it reads next, and what it has said in each turn.

    Args:
        turns: tokens of the prompt, and of each question that follows an answer.
        ending: when an answer has ended; the token that ends it is not read again.
        at_once: tokens of the prompt that are read in the first call; the others follow one by one (None: all).

    Attributes:
        prompt: tokens of the first call.
        said: generated tokens of each turn so far, those that ended the answers included.
        over: the last answer has ended.

    Raises:
        InputError: no prompt, a question without tokens, or `at_once` beyond the prompt.

    Example:
        >>> row = Dialogue([[5, 6], [7, 8]], Ending(None, ends=frozenset({0}), stop=""))
        >>> [row.hear(token) for token in (3, 0, 9, 4)], row.said
        ([3, 7, 8, 4], [[3, 0], [4]])
    """

    def __init__(self, turns: Sequence[Sequence[int]], ending: Ending, at_once: int | None = None) -> None:
        sizes = [len(ids) for ids in turns]
        at_once = at_once if at_once is not None or not sizes else sizes[0]
        if at_once is None or not all(sizes) or not 1 <= at_once <= sizes[0]:
            raise InputError(
                f"a dialogue needs a prompt, tokens in each turn, and 1 <= at_once <= its prompt; got turns of {sizes} "
                f"tokens and at_once={at_once}"
            )
        self.ending = ending
        self.prompt = list(turns[0][:at_once])
        self.said: list[list[int]] = [[]]
        self.over = False
        self._later = deque(turns[1:])
        self._unread = deque(turns[0][at_once:])
        # the call after which the first token of the first answer is known
        self.first = 1 + len(self._unread)

    def hear(self, token: int) -> int:
        """Take what the model says to what it read last, and give what it is to read next."""
        if self._unread:
            # nobody asked it yet
            return self._unread.popleft()
        if self.over:
            return token
        self.said[-1].append(token)
        if not self.ending.reached(self.said[-1]):
            return token
        if not self._later:
            self.over = True
            return token
        self.said.append([])
        self._unread.extend(self._later.popleft())
        return self._unread.popleft()

    @property
    def texts(self) -> list[str]:
        """The answers so far, without what ended them."""
        return [self.ending.text(said) for said in self.said]


@torch.inference_mode()
def hold(loaded: Loaded, rows: Sequence[Dialogue], cache: Any, least: int = 1) -> list[float]:
    """Hold dialogues as one batch until the last of them is over; what each says is then in its `said`.

    A dialogue that is over goes on beside the others, and what it says then is thrown away. The host waits for the
    device once per call.

    Args:
        loaded: the model.
        rows: new dialogues whose prompts have equally many tokens.
        cache: a new cache, or one that has read as many rows.
        least: calls of the model in any case.

    Returns:
        When each call was done, in seconds of `time.perf_counter`.

    Raises:
        InputError: no dialogue, or prompts of different lengths.
    """
    sizes = sorted({len(row.prompt) for row in rows})
    if len(sizes) != 1:
        raise InputError(f"dialogues are held together over prompts of one length; got {len(rows)} of {sizes} tokens")
    step = torch.tensor([row.prompt for row in rows], device=loaded.device)
    done: list[float] = []
    while len(done) < least or not all(row.over for row in rows):
        logits = loaded.model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        step = logits[:, -1:].argmax(-1)
        heard = step[:, 0].tolist()
        done.append(time.perf_counter())
        read = [row.hear(token) for row, token in zip(rows, heard, strict=True)]
        if read != heard:
            # what came from the device is there already; the copy of a question's token is not waited for
            step = torch.tensor(read)[:, None].to(loaded.device, non_blocking=True)
    return done
