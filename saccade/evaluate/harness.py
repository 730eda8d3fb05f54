"""lm-evaluation-harness: its tasks (RULER, LongBench, BABILong, your own) on a model under plans, with dense beside."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saccade.core.errors import FileError, InputError, UnsupportedError
from saccade.core.files import write_whole
from saccade.core.plan import Plan
from saccade.evaluate.model import READER, Loaded
from saccade.evaluate.presets import DENSE, resolve
from saccade.hf.attach import attach
from saccade.reader import path as reader_path

Cell = tuple[str, str, str]  # method, digest of its plan, task that was asked for
ROWS, CONFIG = "lm_eval.jsonl", "lm_eval.json"
NEEDED = "lm-eval: lm-evaluation-harness is not installed here; pip install 'saccade[lm-eval]'"


def installed() -> bool:
    """Is lm-evaluation-harness here, with what its class for transformers needs?"""
    return find_spec("lm_eval") is not None and find_spec("accelerate") is not None


@dataclass(frozen=True)
class Ask:
    """What is asked of the harness; two runs in one folder must agree on all of it.

    Args:
        model: name or folder of the model.
        tasks: names of the harness's tasks and groups, or of those in `include`.
        lengths: tokens, for tasks that are made at a length (RULER); budgets of named methods are set for the longest.
        include: folder of YAML tasks of your own; None = the harness's only.
        limit: documents of each task; None = all.
        fewshot: examples in each prompt; None = as each task says.
        batch: prompts that generate together.
        max_length: tokens of context and answer; None = what the model's config says.
        chat: wrap prompts in the tokenizer's chat template.
        dtype, device: of the model.
    """

    model: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (8192,)
    include: str | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch: int = 1
    max_length: int | None = None
    chat: bool = False
    dtype: str = "float32"
    device: str = "cpu"


def run(
    loaded: Loaded,
    ask: Ask,
    methods: Sequence[str],
    folder: str | os.PathLike[str] | None = None,
    done: Callable[[str, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Let the harness evaluate each method on each task; with a folder, what is there already is not done again.

    Args:
        loaded: the model that `ask` names.
        ask: tasks and how to run them.
        methods: names of presets, or plan files; "dense" is stock transformers and comes first in any case.
        folder: where rows are kept as each task finishes.
        done: called with (method, task) after each.

    Returns:
        A row per method, task, metric and filter: {"method", "task", "metric", "filter", "value", "stderr", "n",
        "higher", "dense", "asked"}. "higher" says whether more is better, "dense" is the value of dense attention,
        "asked" the name that was asked for, which may be a group of tasks.

    Raises:
        UnsupportedError: lm-evaluation-harness is not installed.
        InputError: there is no such task.
        PlanError: there is no such method.
        FileError: the folder holds another evaluation.
    """
    if not installed():
        raise UnsupportedError(NEEDED)
    names = list(dict.fromkeys([DENSE, *methods]))
    plans = {name: resolve(name, loaded, max(ask.lengths)) for name in names}
    manager = _manager(loaded, ask)
    held = {} if folder is None else _opened(Path(folder), ask)
    rows: list[dict[str, Any]] = []
    for task in ask.tasks:
        dense: dict[Any, float] = {}
        for name in names:
            # another plan under the same name is another method
            cell = (name, _digest(plans[name]), task)
            if cell not in held:
                held[cell] = _evaluated(loaded, plans[name], manager, ask, task)
                if folder is not None:
                    _append(Path(folder) / ROWS, cell, held[cell])
                if done is not None:
                    done(name, task)
            if name == DENSE:
                dense = {_key(row): row["value"] for row in held[cell]}
            rows += [{"method": name, **row, "dense": dense.get(_key(row)), "asked": task} for row in held[cell]]
    return rows


@contextlib.contextmanager
def serving(loaded: Loaded, plan: Plan | None, batch: int = 1, max_length: int | None = None) -> Iterator[Any]:
    """A model for the harness (`lm_eval.simple_evaluate(model=...)`): under a plan, or None = stock transformers.

    Example:
        with serving(load("reader"), plan) as lm:
            lm_eval.simple_evaluate(model=lm, tasks=["babilong"])
    """
    from lm_eval.models.huggingface import HFLM

    from saccade.evaluate.harness_model import Attached

    if plan is None:
        yield HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=batch, max_length=max_length)
        return
    with attach(loaded.model, plan) as session:
        yield Attached(loaded, session, batch, max_length)


def _manager(loaded: Loaded, ask: Ask) -> Any:
    from lm_eval.tasks import TaskManager

    if ask.include is not None and not Path(ask.include).is_dir():
        raise FileError(f"lm-eval: {ask.include} is no folder; give one with YAML tasks")
    # what tasks that make their own texts ask for: the tokenizer, and the lengths
    model = str(reader_path()) if loaded.name == READER else loaded.name
    about = {"pretrained": model, "max_seq_lengths": list(ask.lengths)}
    if ask.include is not None:
        # the harness's own thousands take seconds to list
        manager = TaskManager(include_path=ask.include, include_defaults=False, metadata=about)
        if set(ask.tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=ask.include, metadata=about)
    _named(ask.tasks, manager.all_tasks)
    return manager


def _named(tasks: Sequence[str], known: Sequence[str]) -> None:
    for name in tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists all"
            raise InputError(f"lm-eval: unknown task {name!r}; {hint}")


def _evaluated(loaded: Loaded, plan: Plan | None, manager: Any, ask: Ask, task: str) -> list[dict[str, Any]]:
    """The rows of one method on one task or group."""
    from lm_eval import simple_evaluate

    # what it says of a model that is already there is meant for its own command line
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr), serving(loaded, plan, ask.batch, ask.max_length) as lm:
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=manager,
            num_fewshot=ask.fewshot,
            limit=ask.limit,
            apply_chat_template=ask.chat,
            log_samples=False,
            bootstrap_iters=0 if ask.limit == 1 else 1000,
        )
    rows = []
    for name, metrics in found["results"].items():
        counted = found["n-samples"].get(name, {}).get("effective")
        for label, value in metrics.items():
            metric, comma, kind = label.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            # RULER lists 4096 tokens in any case, and says -1 of a length without samples
            if metric.isdigit() and value == -1:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "task": name,
                    "metric": metric,
                    "filter": kind,
                    "value": float(value),
                    "stderr": None if error is None or isinstance(error, str) else float(error),
                    "n": counted,
                    "higher": found["higher_is_better"].get(name, {}).get(metric),
                }
            )
    return rows


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["metric"], row["filter"]


def _digest(plan: Plan | None) -> str:
    return hashlib.sha256(b"stock" if plan is None else plan.to_json().encode()).hexdigest()[:16]


def _append(file: Path, cell: Cell, rows: list[dict[str, Any]]) -> None:
    """A finished cell in a line of its own."""
    line = dict(zip(("method", "plan", "asked"), cell, strict=True), rows=rows)
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


def _opened(folder: Path, ask: Ask) -> dict[Cell, list[dict[str, Any]]]:
    """The cells that are in a folder; a line that was cut off is not one."""
    folder.mkdir(parents=True, exist_ok=True)
    config, wanted = folder / CONFIG, json.loads(json.dumps(asdict(ask)))
    # further tasks may join those that are there
    wanted.pop("tasks")
    if not config.exists():
        write_whole(config, json.dumps(wanted, indent=1) + "\n")
    there = json.loads(config.read_text(encoding="utf-8"))
    differs = [key for key in wanted if there.get(key) != wanted[key]]
    if differs:
        said = ", ".join(f"{key} {there.get(key)}" for key in differs)
        raise FileError(f"{folder}: holds an evaluation with {said}; ask for the same, or choose another --out")
    file = folder / ROWS
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_whole(file, whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    return {(line["method"], line["plan"], line["asked"]): line["rows"] for line in lines}
