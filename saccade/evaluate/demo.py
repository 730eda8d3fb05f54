"""The demonstration: questions about facts planted in a book, answered by stock transformers and by each method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate.measure import answers, looked, times
from saccade.evaluate.model import Loaded
from saccade.evaluate.presets import DENSE, note, resolve
from saccade.evaluate.tasks.base import exact
from saccade.evaluate.tasks.needle import Document, compose
from saccade.evaluate.trace import Trace, trace

ROOM = 64  # tokens left beside the document for a question and its answer
ANSWER = 24


@dataclass(frozen=True)
class Shown:
    """What one method did: its row of the table, and the watched run that its picture comes from.

    Args:
        plan: the plan, None for stock transformers.
        row: method, exact, asked, ttft_s, tpot_s, kv_bytes, density and more.
        trace: the watched answer to the first question.
    """

    plan: Plan | None
    row: dict[str, Any]
    trace: Trace


@dataclass(frozen=True)
class Demo:
    """Everything that was measured.

    Args:
        document: the text and its questions.
        length: tokens of document, question and answer together.
        shown: one per method, dense first.
        layer, head: the head that, in dense attention, looks hardest at the first planted fact.
        marks: where the facts stand in the prompt, 0 to 1.
    """

    document: Document
    length: int
    shown: list[Shown]
    layer: int
    head: int
    marks: list[float]


def demo(
    loaded: Loaded,
    methods: Sequence[str],
    length: int,
    *,
    facts: int = 4,
    seed: int = 0,
    progress: Callable[[str, dict[str, Any] | None], None] | None = None,
) -> Demo:
    """Compose a document, ask every question of dense attention and of each method, and watch one answer of each.

    Args:
        loaded: the model.
        methods: presets or plan files; dense always comes first.
        length: tokens of document, question and answer together.
        facts: planted facts, and questions.
        seed: of the document.
        progress: called with (what goes on, None), and with (method, its row) when a method is finished.

    Raises:
        PlanError: an unknown method, before anything is run.
        InputError: a length too short for the facts.
    """
    say = progress or (lambda text, row: None)
    names = [DENSE, *(name for name in dict.fromkeys(methods) if name != DENSE)]
    plans = {name: resolve(name, loaded, length) for name in names}
    say("composing the document", None)
    document = write_document(loaded, length, facts, seed)
    prompts = [list(loaded.tokenizer(f"{document.text}\n\n{q}")["input_ids"]) for q in document.questions]
    spans = [fact_span(loaded, document, number) for number in range(facts)]
    marks = [(first + end) / 2 / len(prompts[0]) for first, end in spans]
    shown: list[Shown] = []
    layer = head = 0
    for name, plan in plans.items():
        say(f"{name}: warming up", None)
        found = answers(
            loaded,
            plan,
            prompts,
            max_new_tokens=ANSWER,
            done=lambda count, name=name: say(f"{name}: question {count} of {facts}", None),
        )
        say(f"{name}: watching one answer", None)
        if plan is None:
            every = tuple(range(loaded.shape.heads))
            watched = trace(loaded, None, prompts[0], drawn=every, span=spans[0])
            layer, head = watched.finder()
        else:
            watched = trace(loaded, plan, prompts[0], drawn=(head,))
        said = [a.text for a in found]
        right = [exact(text, want) for text, want in zip(said, document.answers, strict=True)]
        row: dict[str, Any] = {"method": name, "exact": int(sum(right)), "asked": len(right)} | times(found)
        seen = looked(watched, plan)
        row |= {"density": seen.pop("density")} | seen
        row |= _beside(row, shown[0].row if shown else row) | {"note": note(plan), "answers": said}
        shown.append(Shown(plan, row, watched))
        say(name, row)
    return Demo(document, length, shown, layer, head, marks)


def write_document(loaded: Loaded, length: int, facts: int, seed: int) -> Document:
    """A document that leaves room for a question and an answer within `length` tokens.

    Raises:
        InputError: too short for so many facts.
    """
    if length < 4 * ROOM + 64 * facts:
        raise InputError(
            f"{length} tokens are too few for a document with {facts} planted {'fact' if facts == 1 else 'facts'}, a "
            f"question and an answer; use a length of {4 * ROOM + 64 * facts} or more"
        )
    try:
        return compose(loaded.tokenizer, length - ROOM, facts=facts, seed=seed)
    except ValueError as error:
        raise InputError(f"no document of {length} tokens with {facts} facts could be made: {error}") from None


def fact_span(loaded: Loaded, document: Document, number: int) -> tuple[int, int]:
    """First and last + 1 token of a planted fact."""
    at = document.text.index(document.facts[number])
    counts = [len(loaded.tokenizer(document.text[:end])["input_ids"]) for end in (at, at + len(document.facts[number]))]
    return counts[0], counts[1]


def _beside(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """How many times faster than dense, and the share of its bytes."""

    def ratio(key: str) -> float | None:
        return round(dense[key] / row[key], 3) if dense[key] and row[key] else None

    return {
        "ttft_ratio": ratio("ttft_s"),
        "tpot_ratio": ratio("tpot_s"),
        "kv_share": round(row["kv_bytes"] / dense["kv_bytes"], 4) if dense["kv_bytes"] else None,
    }
