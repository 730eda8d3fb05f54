"""One cell of an evaluation: a method's answers to the samples of a task and length, and what giving them took.

Everything here works on its arguments alone, so that a cell comes out the same in this process, in another one, or on
another machine.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate import fields, headmap
from saccade.evaluate.fidelity import read_dense
from saccade.evaluate.generate import Answer, untimed
from saccade.evaluate.measure import answers, answers_together, outcomes, times
from saccade.evaluate.metrics import mean_score
from saccade.evaluate.model import Loaded
from saccade.evaluate.samples import Cell, lines_of
from saccade.evaluate.tasks import TASKS, load_task

KEY = ("method", "task", "length")
SCORES = ("n", "score", "low", "high")
TIMES = ("ttft_s", "tpot_s", "kv_bytes")
FIELDS = (
    *KEY,
    *SCORES,
    "density",
    "mass",
    *TIMES,
    *(f for f in fields.FIELDS if f not in ("density", "mass")),
    "batch",
)
WATCHED = 8  # tokens generated to measure density and mass
TIMED = 3  # samples that are answered alone for the clock, where the others are read together
TOKENS = 2**20  # most tokens of prompts that are read together: a GPU is busy long before
WORKERS = 16  # may share a GPU without running out of its memory


@dataclass(frozen=True)
class Job:
    """A cell that is to be measured, as it travels to whoever measures it.

    Args:
        cell: method, task, length.
        plan: the method's plan, None for stock transformers.
        batch: prompts that are read together.
        alone: nothing else runs beside it, so that times may be taken.
    """

    cell: Cell
    plan: Plan | None
    batch: int = 1
    alone: bool = True


@dataclass(frozen=True)
class Drawn:
    """The samples of a task and length, and how stock attention reads the first of them.

    Args:
        samples: the samples.
        dense: what `saccade.evaluate.fidelity.read_dense` found, with which every method is compared.
    """

    samples: list[Any]
    dense: Any


@dataclass(frozen=True)
class Found:
    """What came of a cell: fields of its row, a line per sample, a map of its heads per phase."""

    row: dict[str, Any]
    lines: list[dict[str, Any]]
    maps: list[dict[str, Any]]


def get_task(name: str) -> Any:
    """A task by name.

    Raises:
        InputError: there is none of this name; names the nearest.
    """
    try:
        return load_task(name)
    except ValueError as error:
        raise InputError(f"{error}; tasks: {', '.join(TASKS)}") from None


def batch_of(loaded: Loaded, length: int) -> int:
    """Prompts of a length that are read together unless somebody says otherwise: 1 on a CPU, on a GPU as many as fit
    into the memory of one of 16 workers.

    It depends on the GPU's size alone, not on what is free at the moment or on how many workers there are, so that two
    runs come out the same.

    Args:
        loaded: the model.
        length: tokens of a prompt.
    """
    if loaded.device.type != "cuda":
        return 1
    config = loaded.model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    # keys and values at their widest, and some dozen activations of a token that live at once
    each = loaded.model.dtype.itemsize * config.hidden_size * (2 * config.num_hidden_layers + 12)
    room = torch.cuda.get_device_properties(loaded.device).total_memory * 3 // 4 // WORKERS
    return max(1, min(room // each, TOKENS) // length)


def draw(loaded: Loaded, task: str, length: int, count: int, seed: int) -> Drawn:
    """The first `count` samples of a task and length, and the first one read by stock attention."""
    source = get_task(task)
    samples = [source.sample(loaded.tokenizer, length, index, seed) for index in range(count)]
    # what is generated under watch stays within the length, too
    first = samples[0].ids[: length - WATCHED]
    return Drawn(samples, read_dense(loaded, first, most=max(samples[0].max_new_tokens, WATCHED)))


def measure(loaded: Loaded, job: Job, drawn: Drawn) -> Found:
    """Answer all samples of a cell, score them, and look at what the method looked at.

    Where prompts are read together and nothing runs beside, a few of them are answered once more alone, for the times.
    """
    task, samples = get_task(job.cell[1]), drawn.samples
    said, scores, row, batch = _scored(loaded, job.plan, task, samples, job.batch)
    clock = said
    if batch > 1 and job.alone:
        clock = _alone(loaded, job.plan, task, samples[:TIMED])
    took = times(clock)
    if not job.alone:
        took |= {"ttft_s": None, "tpot_s": None}
    if batch > 1 or not job.alone:
        said = [untimed(one) for one in said]
    seen = fields.measures(loaded, job.plan, drawn.dense, clocked=job.alone)
    row |= seen.row | took | {"batch": batch}
    shape = loaded.shape
    maps = [] if seen.look is None else headmap.lines_of(job.cell, seen.look, shape.layers, shape.heads)
    return Found(row, lines_of(job.cell, samples, said, scores), maps)


def clock(loaded: Loaded, job: Job, drawn: Drawn) -> dict[str, Any]:
    """The times of a cell whose scores were found while other things ran: a few samples, each alone."""
    took = times(_alone(loaded, job.plan, get_task(job.cell[1]), drawn.samples[:TIMED]))
    return took | fields.clock(loaded, job.plan, drawn.dense)


def draw_packed(loaded: Loaded, task: str, length: int, count: int, seed: int) -> bytes:
    """`draw`, as bytes that whoever passes them on need not open."""
    return pickle.dumps(draw(loaded, task, length, count, seed))


def measure_packed(loaded: Loaded, job: Job, drawn: bytes) -> Found:
    """`measure` of what `draw_packed` gave."""
    return measure(loaded, job, pickle.loads(drawn))


def _scored(
    loaded: Loaded, plan: Plan | None, task: Any, samples: Sequence[Any], batch: int
) -> tuple[list[Answer], list[float], dict[str, Any], int]:
    """Answers, a score for each, the row's score and interval, and how many prompts were read together."""
    if hasattr(task, "run"):
        read, batch = outcomes(loaded, plan, task, samples, batch)
        return [one.answer for one in read], [one.score for one in read], dict(task.summary(read)), batch
    prompts, most = [sample.ids for sample in samples], max(sample.max_new_tokens for sample in samples)
    if batch > 1:
        said, batch = answers_together(loaded, plan, prompts, batch, max_new_tokens=most)
    else:
        said = answers(loaded, plan, prompts, max_new_tokens=most)
    scores = [task.score(one.text, sample) for one, sample in zip(said, samples, strict=True)]
    score = mean_score(scores)
    row = {"n": score.n, "score": score.score, "low": round(score.low, 4), "high": round(score.high, 4)}
    return said, scores, row, batch


def _alone(loaded: Loaded, plan: Plan | None, task: Any, samples: Sequence[Any]) -> list[Answer]:
    if hasattr(task, "run"):
        return [one.answer for one in outcomes(loaded, plan, task, samples)[0]]
    most = max(sample.max_new_tokens for sample in samples)
    return answers(loaded, plan, [sample.ids for sample in samples], max_new_tokens=most)
