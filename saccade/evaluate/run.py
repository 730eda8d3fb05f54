"""The evaluation runner: every method on the same samples of every task and length, a row on disk per cell.

A cell is (method, task, length). Rows go to `rows.jsonl` one by one, so that a run that was cut off goes on where it
stopped; `config.json` beside it says what was asked for, and a run that asks for something else is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saccade.core.errors import FileError, InputError
from saccade.core.plan import Plan
from saccade.evaluate import headmap
from saccade.evaluate.files import write_whole
from saccade.evaluate.measure import answers, looked, outcomes, times
from saccade.evaluate.metrics import mean_score
from saccade.evaluate.model import Loaded
from saccade.evaluate.presets import resolve
from saccade.evaluate.samples import Cell, lines_of
from saccade.evaluate.samples import append as append_lines
from saccade.evaluate.tasks import TASKS, load_task
from saccade.evaluate.trace import trace

FIELDS = ("method", "task", "length", "n", "score", "low", "high", "density", "mass", "ttft_s", "tpot_s", "kv_bytes")
KEY = FIELDS[:3]
WATCHED = 8  # tokens generated to measure density and mass


@dataclass(frozen=True)
class Ask:
    """What an evaluation is asked for; two runs in one folder must agree on all of it.

    Args:
        model: name or folder of the model.
        methods: names of presets, or plan files.
        tasks: names of tasks.
        lengths: tokens of prompt and answer together.
        samples: samples per cell.
        seed: of the samples.
        dtype, device: of the model.
        plan_files: digest of each plan file among the methods, so that an edited one is noticed.
    """

    model: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int = 10
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    plan_files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.methods and self.tasks and self.lengths):
            raise InputError("eval: needs at least one method or plan, one task and one length")
        if self.samples < 1 or min(self.lengths) < 1:
            raise InputError(f"eval: samples and lengths must be >= 1, got {self.samples} and {list(self.lengths)}")

    def cells(self) -> Iterator[tuple[str, str, int]]:
        """All (method, task, length), short ones first so that something is there soon."""
        for length in self.lengths:
            for task in self.tasks:
                for method in self.methods:
                    yield method, task, length


@dataclass
class Store:
    """The folder of an evaluation: config.json and rows.jsonl.

    Args:
        folder: made where it is missing.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], ask: Ask) -> Store:
        """Open or start; rows that were cut off or failed are taken out, to be done again.

        Raises:
            FileError: the folder holds an evaluation with other arguments, or a file that is none of ours.
        """
        store = cls(Path(folder))
        store.folder.mkdir(parents=True, exist_ok=True)
        config = store.folder / "config.json"
        wanted = json.loads(json.dumps(asdict(ask)))
        if config.exists():
            _same(_read(config), wanted, config)
        elif store.path.exists() and store.path.stat().st_size:
            raise FileError(f"{store.path}: there are rows but no config.json; choose another --out")
        else:
            write_whole(config, json.dumps(wanted, indent=1) + "\n")
        store._load(ask)
        return store

    @property
    def path(self) -> Path:
        """Where the rows are."""
        return self.folder / "rows.jsonl"

    def has(self, cell: tuple[str, str, int]) -> bool:
        """Is this cell finished?"""
        return any(tuple(row[key] for key in KEY) == cell for row in self.rows)

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished row: one write at the end of the file, on the disk before this returns."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)
        self.rows.append(row)

    def _load(self, ask: Ask) -> None:
        if not self.path.exists():
            return
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        lines = text.split("\n")
        known = set(ask.cells())
        for at, line in enumerate(lines):
            if not line:
                continue
            try:
                row = json.loads(line)
                cell = tuple(row[key] for key in KEY)
            except (ValueError, KeyError, TypeError):
                # a crash cuts the last line and no other
                if at == len(lines) - 1:
                    continue
                raise FileError(f"{self.path}: line {at + 1} is not a row of an evaluation") from None
            if at < len(lines) - 1 and cell in known and row.get("error") is None and not self.has(cell):
                self.rows.append(row)
        clean = "".join(json.dumps(row) + "\n" for row in self.rows)
        if clean != text:
            write_whole(self.path, clean)


def run(
    loaded: Loaded,
    ask: Ask,
    folder: str | os.PathLike[str],
    progress: Callable[[dict[str, Any], int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run an evaluation, or what is left of it.

    Args:
        loaded: the model that `ask` names.
        ask: what to run.
        folder: where rows.jsonl and config.json go.
        progress: called with (row, finished cells, all cells) after each cell that was run.

    Returns:
        All rows of the folder, in the order of `ask.cells()`.

    Raises:
        PlanError, InputError: an unknown method, plan file or task, before anything is run.
        FileError: the folder holds another evaluation.
    """
    tasks = {name: get_task(name) for name in ask.tasks}
    plans = {(m, length): resolve(m, loaded, length) for m in ask.methods for length in ask.lengths}
    store = Store.open(folder, ask)
    cells = list(ask.cells())
    samples: dict[tuple[str, int], list[Any]] = {}
    for cell in cells:
        method, task, length = cell
        if store.has(cell):
            continue
        row: dict[str, Any] = dict.fromkeys(FIELDS) | dict(zip(KEY, cell, strict=True))
        try:
            if (task, length) not in samples:
                # one set of samples at a time: all methods of a task and length follow each other
                samples = {(task, length): _samples(loaded, tasks[task], length, ask)}
            found, each, maps = _cell(cell, loaded, plans[method, length], tasks[task], samples[task, length])
            append_lines(store.folder, each)
            append_lines(store.folder, maps, headmap.FILE)
            row |= found
        except Exception as error:  # a cell that fails must not take the others with it
            row["error"] = f"{type(error).__name__}: {error}"
        store.append(row)
        if progress is not None:
            progress(row, len(store.rows), len(cells))
    order = {cell: at for at, cell in enumerate(cells)}
    return sorted(store.rows, key=lambda row: order[tuple(row[key] for key in KEY)])


def get_task(name: str) -> Any:
    """A task by name.

    Raises:
        InputError: there is none of this name; names the nearest.
    """
    try:
        return load_task(name)
    except ValueError as error:
        raise InputError(f"{error}; tasks: {', '.join(TASKS)}") from None


def _samples(loaded: Loaded, task: Any, length: int, ask: Ask) -> list[Any]:
    return [task.sample(loaded.tokenizer, length, index, ask.seed) for index in range(ask.samples)]


def _cell(
    cell: Cell, loaded: Loaded, plan: Plan | None, task: Any, samples: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    if hasattr(task, "run"):
        read = outcomes(loaded, plan, task, samples)
        said, scores, found = [one.answer for one in read], [one.score for one in read], task.summary(read)
    else:
        most = max(sample.max_new_tokens for sample in samples)
        said = answers(loaded, plan, [sample.ids for sample in samples], max_new_tokens=most)
        scores = [task.score(a.text, sample) for a, sample in zip(said, samples, strict=True)]
        score = mean_score(scores)
        found = {"n": score.n, "score": score.score, "low": round(score.low, 4), "high": round(score.high, 4)}
    # what is generated under watch stays within the length, too
    ids = samples[0].ids[: cell[2] - WATCHED]
    watched = None if plan is None else trace(loaded, plan, ids, max_new_tokens=WATCHED)
    seen = looked(watched, plan)
    row = found | {key: seen[key] for key in ("density", "mass")} | times(said)
    maps = [] if watched is None else headmap.lines_of(cell, watched.meter, loaded.shape.layers, loaded.shape.heads)
    return row, lines_of(cell, samples, said, scores), maps


def _same(stored: Any, wanted: dict[str, Any], config: Path) -> None:
    if not isinstance(stored, dict):
        raise FileError(f"{config}: not the config of an evaluation")
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise FileError(
                f"{config.parent} holds an evaluation with {key} {stored.get(key)!r}, not {value!r}: "
                "choose another --out, or the same arguments"
            )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path}: not readable as JSON ({error})") from None
