"""Evaluations by a crew: the same rows as by one process, whatever happens to a worker."""

import json
import os
import pickle
import signal
from collections import deque
from functools import partial

import pytest
import tiny_model
import torch

from saccade.core.errors import InputError
from saccade.core.machine import cpus
from saccade.evaluate.crew import CrewError, Outcome, Processes, Setup, called, setups
from saccade.evaluate.headmap import FILE as HEADS
from saccade.evaluate.model import load
from saccade.evaluate.report.folder import read_folder
from saccade.evaluate.run import Ask, Store, run
from saccade.evaluate.samples import FILE as SAMPLES

METHODS, TASKS = ("dense", "streaming", "quest"), ("copy-perplexity", "needle", "kv")
UNTIMED = ("ttft_s", "tpot_s", "waterfall", "peak_bytes")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny model in a folder, so that other processes can load it, too."""
    return load(tiny_model.save(tmp_path_factory.mktemp("small"), num_hidden_layers=2), device="cpu")


@pytest.fixture
def ask(small):
    return Ask(small.name, METHODS, TASKS, (400,), samples=2)


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """What one process finds."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(small, Ask(small.name, METHODS, TASKS, (400,), samples=2), folder)


class Inline:
    """A crew in this process: a call is run when its turn comes, the last one given first.

    Args:
        loaded: the model of all workers.
        dies: the numbers of the calls whose worker ends.
        stops: the number of the call after which Ctrl-C is pressed.
    """

    def __init__(self, loaded, size=3, dies=(), stops=None):
        self.loaded, self.size, self.dies, self.stops = loaded, size, dies, stops
        self.given, self.running = [], deque()

    def __len__(self):
        return self.size

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.running.clear()

    def idle(self):
        busy = [worker for worker, _ in self.running]
        return [worker for worker in range(self.size) if worker not in busy]

    def give(self, worker, function, *arguments):
        assert worker in self.idle()
        self.running.append((worker, pickle.dumps((function, arguments))))

    def wait(self):
        worker, call = self.running.pop()
        function, arguments = pickle.loads(call)
        self.given.append((function.__name__, arguments[0]))
        if len(self.given) == self.stops:
            raise KeyboardInterrupt
        if len(self.given) in self.dies:
            return Outcome(worker, None, "WorkerEnded: gone", ended=True)
        return Outcome(worker, *pickle.loads(pickle.dumps(called(self.loaded, function, arguments))))


def lines_in(folder, name="rows.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def plain(rows):
    """Rows without times."""
    return [{key: value for key, value in row.items() if key not in UNTIMED} for row in rows]


def ordered(lines):
    """Lines of samples or heads without times, in an order that does not depend on who was first."""
    return sorted(json.dumps(line, sort_keys=True) for line in plain(lines))


def check_same(alone, folder, rows):
    """The scores, samples and maps of one process; times once per method."""
    assert plain(rows) == plain(alone[1])
    for name in (SAMPLES, HEADS):
        assert ordered(lines_in(folder, name)) == ordered(lines_in(alone[0], name))
    timed = [(row["method"], row["task"]) for row in rows if row["ttft_s"] is not None]
    # the first task that is a prompt and its answer
    assert timed == [(method, "needle") for method in METHODS]
    assert all(row["waterfall"] is not None for row in rows if row["task"] == "needle")
    assert not any(row["waterfall"] for row in rows if row["task"] != "needle")


def test_a_crew_finds_what_one_process_finds(small, ask, alone, tmp_path):
    told = []
    crew = Inline(small)
    rows = run(small, ask, tmp_path, lambda row, done, total: told.append((done, total)), crew=lambda: crew)
    check_same(alone, tmp_path, rows)
    # 3 x 3 cells, then times of one task
    assert told == [(at, 9) for at in range(1, 10)] + [(9, 9)] * 3
    # samples are drawn once, before any cell of theirs
    assert sorted(at for name, at in crew.given if name == "draw_packed") == sorted(TASKS)
    for at, (name, job) in enumerate(crew.given):
        if name == "measure_packed":
            assert ("draw_packed", job.cell[1]) in crew.given[:at]
    # of two rows of a cell the one with times counts, for this reader and for the report's
    assert len(lines_in(tmp_path)) == 12
    assert {row["method"]: row["ttft_s"] for row in read_folder(tmp_path).rows if row["task"] == "needle"} == {
        row["method"]: row["ttft_s"] for row in rows if row["task"] == "needle"
    }
    assert Store.open(tmp_path, ask).by_cell == {(row["method"], row["task"], row["length"]): row for row in rows}


@pytest.mark.parametrize("stops", [1, 4, 8])
def test_goes_on_where_a_crew_was_interrupted(small, ask, alone, tmp_path, stops):
    with pytest.raises(KeyboardInterrupt):
        run(small, ask, tmp_path, crew=lambda: Inline(small, stops=stops))
    before = lines_in(tmp_path) if (tmp_path / "rows.jsonl").exists() else []
    assert len(before) < 9 and not any(row["ttft_s"] for row in before)
    crew = Inline(small)
    check_same(alone, tmp_path, run(small, ask, tmp_path, crew=lambda: crew))
    assert sum(name == "measure_packed" for name, _ in crew.given) == 9 - len(before)
    assert lines_in(tmp_path)[: len(before)] == before


def test_times_that_were_not_taken_are_taken_later(small, ask, alone, tmp_path, monkeypatch):
    from saccade.evaluate import run as runner

    def broken(*_):
        raise RuntimeError("no clock")

    monkeypatch.setattr(runner, "clock", broken)
    rows = run(small, ask, tmp_path, crew=lambda: Inline(small))
    assert not any(row["ttft_s"] or row.get("error") for row in rows)
    monkeypatch.undo()

    def nobody():
        raise AssertionError("all cells are there")

    check_same(alone, tmp_path, run(small, ask, tmp_path, crew=nobody))


def test_a_worker_that_ends_costs_its_cell_alone(small, ask, alone, tmp_path):
    crew = Inline(small, dies=[6])
    rows = run(small, ask, tmp_path, crew=lambda: crew)
    lost = crew.given[5][1].cell
    (failed,) = [row for row in rows if row.get("error")]
    assert (failed["method"], failed["task"], failed["length"]) == lost and "gone" in failed["error"]
    check_same(alone, tmp_path, run(small, ask, tmp_path, crew=lambda: Inline(small)))


def test_samples_are_drawn_again_by_another_worker_once(small, ask, alone, tmp_path):
    crew = Inline(small, dies=[1])
    check_same(alone, tmp_path / "a", run(small, ask, tmp_path / "a", crew=lambda: crew))
    assert crew.given[0][0] == "draw_packed" and crew.given.count(crew.given[0]) == 2
    crew = Inline(small, size=1, dies=[1, 2])
    rows = run(small, ask, tmp_path / "b", crew=lambda: crew)
    assert [row["task"] for row in rows if row.get("error")] == ["copy-perplexity"] * 3


def test_samples_that_cannot_be_drawn_fail_their_cells(small, tmp_path):
    # too short for a passage of 128 tokens twice
    ask = Ask(small.name, ("dense", "streaming"), ("copy-perplexity", "needle"), (200,), samples=1)
    rows = run(small, ask, tmp_path / "crew", crew=lambda: Inline(small))
    assert [row.get("error", "")[:12] for row in rows] == ["InputError: "] * 2 + [""] * 2
    assert plain(rows) == plain(run(small, ask, tmp_path / "alone"))


@pytest.mark.slow
def test_processes_find_the_same_and_outlive_a_kill(small, ask, alone, tmp_path):
    class Deadly(Processes):
        """Kills the worker that is given one cell."""

        killed = 0

        def give(self, worker, function, *arguments):
            super().give(worker, function, *arguments)
            if function.__name__ == "measure_packed" and arguments[0].cell[:2] == ("streaming", "kv"):
                os.kill(self._workers[worker].process.pid, signal.SIGKILL)
                self.killed += 1

    crew = Deadly(setups(small, 2, "cpu", 1))
    rows = run(small, ask, tmp_path, crew=lambda: crew)
    (failed,) = [row for row in rows if row.get("error")]
    assert (failed["method"], failed["task"]) == ("streaming", "kv") and "exit code -9" in failed["error"]
    assert crew.killed == 1
    check_same(alone, tmp_path, run(small, ask, tmp_path, crew=lambda: Inline(small)))


@pytest.mark.slow
def test_a_model_that_is_not_there_is_said(tmp_path):
    setup = Setup(str(tmp_path), "float32", "cpu", 1)
    with (
        pytest.raises(CrewError, match=r"could not load the model: FileError.*config\.json"),
        Processes([setup]) as crew,
    ):
        crew.wait()


def test_a_setup_for_each_worker(small):
    found = setups(small, 3, None, None)
    assert [setup.device for setup in found] == ["cpu"] * 3 and found[0].model == small.name
    assert all(setup.threads == max(1, cpus() // 3) for setup in found)
    assert setups(small, 1, "cpu", 5)[0].threads == 5


def test_gpus_are_taken_in_turn(small, monkeypatch):
    class OnGpu:
        name, dtype, device = small.name, "bfloat16", torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [setup.device for setup in setups(OnGpu, 3, "cuda", 1)] == ["cuda:0", "cuda:1", "cuda:0"]
    # one that was named is the only one
    assert [setup.device for setup in setups(OnGpu, 2, "cuda:1", 1)] == ["cuda:1"] * 2


@pytest.mark.slow
def test_ray_finds_the_same(small, ask, alone, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    from saccade.evaluate.crew_ray import Actors

    crew = partial(Actors, Setup(small.name, "float32", "cpu", 1), 2)
    rows = run(small, ask, tmp_path, crew=crew)
    check_same(alone, tmp_path, rows)


def test_without_ray_it_is_said(monkeypatch):
    import sys

    from saccade.core.errors import UnsupportedError
    from saccade.evaluate.crew_ray import Actors

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r"ray is not installed.*saccade\[ray\]"):
        Actors(Setup("reader", "float32", "cpu"))


def test_a_wrong_task_is_said_before_workers_start(small, ask, tmp_path):
    from dataclasses import replace

    def nobody():
        raise AssertionError("nothing is to be done")

    with pytest.raises(InputError, match="did you mean 'needle'"):
        run(small, replace(ask, tasks=("neddle",)), tmp_path / "a", crew=nobody)
