import json
import signal
import subprocess
import sys
import time

import pytest

from saccade.core.plan import ModelShape, Plan


def rows_of(folder):
    file = folder / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_rows_table_and_controls(saccade, tiny, tmp_path):
    argv = ["eval", "--model", tiny, "--methods", "minference", "--controls", "--tasks", "needle,kv"]
    argv += ["--lengths", "512", "--samples", 2, "--out", tmp_path]
    code, out, err = saccade(*argv, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["method"] for row in rows] == ["dense", "streaming", "random", "oracle", "minference"] * 2
    assert rows == rows_of(tmp_path)
    assert "[10/10]" in err
    code, out, err = saccade(*argv)
    assert code == 0 and err == ""
    assert "0.00-0.66" in out
    assert max(map(len, out.splitlines()[:-1])) <= 100


def test_an_edited_plan_file_is_noticed(saccade, tiny, tmp_path):
    shape, file = ModelShape(4, 4, 2), tmp_path / "plan.json"
    Plan.uniform(shape, prefill=("streaming", {"sink": 4, "recent": 64})).save(file)
    argv = ["eval", "--model", tiny, "--plans", file, "--lengths", "400", "--samples", 1, "--out", tmp_path / "out"]
    assert saccade(*argv)[0] == 0
    Plan.uniform(shape, prefill=("streaming", {"sink": 4, "recent": 32})).save(file)
    code, _, err = saccade(*argv)
    assert code == 2 and "plan_files" in err


@pytest.mark.slow
def test_a_real_ctrl_c_keeps_finished_cells_and_the_run_goes_on(tiny, tmp_path):
    argv = [sys.executable, "-m", "saccade", "eval", "--model", tiny, "--methods", "dense,streaming,trishape"]
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
