import json
import signal
import subprocess
import sys
import time

import pytest

from saccade.cli.eval import text_table
from saccade.core.plan import ModelShape, Plan
from saccade.evaluate.model import load
from saccade.evaluate.presets import preset


def rows_of(folder):
    file = folder / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_rows_table_and_controls(saccade, tiny, tmp_path):
    argv = ["eval", "--model", tiny, "--methods", "minference", "--tasks", "needle,kv"]
    argv += ["--lengths", "512", "--samples", 2, "--out", tmp_path]
    code, out, err = saccade(*argv, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["method"] for row in rows] == ["dense", "streaming", "random", "oracle", "minference"] * 2
    assert rows == rows_of(tmp_path)
    compared = json.loads(out)["against_dense"]
    assert [one["method"] for one in compared] == ["streaming", "random", "oracle", "minference"] * 2
    assert all(one["verdict"] == "same" and one["p"] == 1.0 and one["n"] == 2 for one in compared)
    assert "[10/10]" in err
    code, out, err = saccade(*argv)
    assert code == 0 and err == ""
    assert "0.00-0.66" in out and " same " in out and "8 comparisons" in out
    assert max(map(len, out.splitlines()[:12])) <= 100


def test_controls_may_be_left_out(saccade, tiny, tmp_path):
    argv = ["eval", "--model", tiny, "--methods", "streaming", "--no-controls", "--tasks", "kv", "--lengths", "400"]
    code, out, err = saccade(*argv, "--samples", 3, "--batch", 3, "--out", tmp_path, "--json")
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    assert (row["method"], row["batch"]) == ("streaming", 3) and row["ttft_s"] > 0
    assert json.loads(out)["against_dense"] == []


def test_a_suite_sets_what_is_not_named(saccade, tiny, tmp_path, monkeypatch):
    from saccade.evaluate import run as runner
    from saccade.evaluate.suites import SUITES

    asked = []
    monkeypatch.setattr(runner, "run", lambda loaded, ask, *_, **__: asked.append(ask) or [])
    for more in ([], ["--controls"], ["--lengths", "512", "--samples", 4], ["--methods", "tidal", "--tasks", "kv"]):
        code, _, err = saccade("eval", "--model", tiny, "--suite", "quick", *more, "--out", tmp_path)
        assert code == 0, err
    quick, every, shorter, other = asked
    suite = SUITES["quick"]
    assert (quick.methods, quick.tasks, quick.lengths, quick.samples) == (
        *(suite.methods, suite.tasks),
        *(suite.lengths, suite.samples),
    )
    assert set(every.methods) == {*suite.methods, "random", "oracle"}
    assert (shorter.lengths, shorter.samples, shorter.tasks) == ((512,), 4, suite.tasks)
    assert (other.methods, other.tasks, other.lengths) == (("tidal",), ("kv",), suite.lengths)
    code, _, err = saccade("eval", "--suite", "quik", "--out", tmp_path)
    assert code == 2 and "known are quick, full" in err


def test_suites_can_be_made(tiny):
    """Every method has a plan for the reader, every task a sample at every length."""
    from saccade.evaluate.model import load
    from saccade.evaluate.presets import resolve
    from saccade.evaluate.run import get_task
    from saccade.evaluate.suites import SUITES

    loaded = load("reader", device="cpu")
    for suite in SUITES.values():
        for length in suite.lengths:
            for method in suite.methods:
                plan = resolve(method, loaded, length)
                assert (plan is None) == (method == "dense")
        for task in suite.tasks:
            sample = get_task(task).sample(loaded.tokenizer, suite.lengths[0], 0)
            assert len(sample.ids) + sample.max_new_tokens <= suite.lengths[0]
    assert {"dense", "streaming", "random", "oracle"} < set(SUITES["full"].methods)


@pytest.mark.slow
def test_jobs_give_the_rows_of_one_process(saccade, tiny, tmp_path):
    argv = ["eval", "--model", tiny, "--methods", "dense,streaming", "--no-controls", "--tasks", "kv,copy-perplexity"]
    argv += ["--lengths", "400", "--samples", 2, "--json", "--threads", 1]
    found = []
    for jobs, folder in ((1, "a"), (2, "b")):
        code, out, err = saccade(*argv, "--jobs", jobs, "--out", tmp_path / folder)
        assert code == 0 and "[4/4]" in err, err
        found.append(json.loads(out)["rows"])
    times = ("ttft_s", "tpot_s", "waterfall", "peak_bytes")
    one, two = ([{key: row[key] for key in row if key not in times} for row in rows] for rows in found)
    assert one == two
    assert [row["ttft_s"] is not None for row in found[1]] == [True, True, False, False]


def test_a_p_of_one_is_not_shown_as_nothing():
    from saccade.cli.eval import _verdict
    from saccade.evaluate.report.compare import paired
    from saccade.evaluate.significance import Verdict

    # one question, lost: McNemar's exact test says 1
    lost = paired([0.0], [1.0])
    assert lost.p == 1.0
    assert _verdict(Verdict("even", lost)) == "even 1.000"
    assert _verdict(Verdict("worse", lost._replace(p=0.0312))) == "worse .031"
    assert _verdict(Verdict("worse", lost._replace(p=0.0002))) == "worse <.001"


def test_a_failed_cell_is_told_by_the_exit_code(saccade, tiny, tmp_path):
    argv = ["eval", "--model", tiny, "--methods", "dense", "--no-controls", "--tasks", "needle,copy-perplexity"]
    code, out, _ = saccade(*argv, "--lengths", 200, "--samples", 1, "--out", tmp_path)
    assert code == 1 and "failed: dense on copy-perplexity at 200" in out
    assert [row["error"] is None for row in rows_of(tmp_path) if "error" in row].count(False) == 1


def test_an_edited_plan_file_is_noticed(saccade, tiny, tmp_path):
    shape, file = ModelShape(4, 4, 2), tmp_path / "plan.json"
    Plan.uniform(shape, prefill=("streaming", {"sink": 4, "recent": 64})).save(file)
    argv = [
        "eval",
        "--model",
        tiny,
        "--plans",
        file,
        "--no-controls",
        "--lengths",
        "400",
        "--samples",
        1,
        "--out",
        tmp_path / "out",
    ]
    assert saccade(*argv)[0] == 0
    Plan.uniform(shape, prefill=("streaming", {"sink": 4, "recent": 32})).save(file)
    code, _, err = saccade(*argv)
    assert code == 2 and "plan_files" in err


@pytest.mark.slow
def test_a_real_ctrl_c_keeps_finished_cells_and_the_run_goes_on(tiny, tmp_path):
    argv = [
        sys.executable,
        "-m",
        "saccade",
        "eval",
        "--model",
        tiny,
        "--methods",
        "dense,streaming,trishape",
        "--no-controls",
    ]
    argv += ["--lengths", "400,512,640", "--samples", "3", "--threads", "1", "--out", str(tmp_path)]
    # a shell that starts jobs in the background lets them ignore Ctrl-C, and children inherit that
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard)
    until = time.monotonic() + 60
    while not rows_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    kept = rows_of(tmp_path)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err and "the same command goes on" in err
    assert 1 <= len(kept) < 9
    done = subprocess.run([*argv, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == len(rows_of(tmp_path)) == 9
    assert rows_of(tmp_path)[: len(kept)] == kept


def test_a_plan_file_is_shown_by_its_name_and_columns_are_explained(saccade, tiny, tmp_path):
    preset("streaming", ModelShape.of(load(tiny, device="cpu").model), 400).save(tmp_path / "mine.json")
    argv = ["eval", "--model", tiny, "--plans", tmp_path / "mine.json", "--no-controls", "--tasks", "kv"]
    code, out, err = saccade(*argv, "--lengths", "400", "--samples", 1, "--out", tmp_path / "out")
    assert code == 0, err
    head, rule, line, *below = out.splitlines()
    assert line.startswith("mine.json ") and str(tmp_path) not in line
    said = " ".join(below)
    assert all(f"{name}: " in said for name in ("reads", "mass", "first", "token", "kv")) and "mass" in head
    assert max(map(len, [head, rule, *below[:2]])) <= 100


def test_plan_files_of_the_same_name_keep_their_folders():
    rows = [
        dict.fromkeys(("score", "low", "n", "density", "mass", "ttft_s", "tpot_s", "kv_bytes"))
        | {"method": name, "task": "kv", "length": 400}
        for name in ("a/plan.json", "b/plan.json", "c/other.tsv", "quest")
    ]
    shown = [line.split()[0] for line in text_table(rows).splitlines()[2:]]
    assert shown == ["a/plan.json", "b/plan.json", "other.tsv", "quest"]
