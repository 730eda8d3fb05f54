import json
from dataclasses import replace

import pytest

from saccade.core.plan import Assign, ModelShape, Plan
from saccade.core.table import METHODS


def document(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_list(saccade):
    rows = document(saccade("list", "--json"))
    assert [row["name"] for row in rows] == list(METHODS)
    assert all(list(row)[:5] == ["name", "family", "phases", "trained", "paper"] for row in rows)
    by_name = {row["name"]: row for row in rows}
    assert by_name["duo"]["phases"] == ["cache"] and by_name["duo"]["family"] == "policy"
    assert by_name["lightning"]["trained"] is True and by_name["streaming"]["trained"] is False
    # its hyperparameter of this name is a length, and no claim
    assert by_name["hipextend"]["trained"] is False and by_name["seer"]["trained"] is True
    assert all(row["idea"] for row in rows)
    code, out, _ = saccade("list")
    assert code == 0 and all(name in out for name in METHODS)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    "method, kind",
    [
        ("dense", "prefill"),
        ("streaming", "prefill"),
        ("minference+tidal", "prefill"),
        ("tidal", "decode"),
        ("lightning", "mixing"),
        ("routing", "mixing"),
    ],
)
def test_show(saccade, tiny, tmp_path, method, kind):
    argv = ["show", method, "--model", tiny, "--length", 512, "--out", tmp_path / "a.png"]
    found = document(saccade(*argv, "--json"))
    assert (found["method"], found["kind"]) == (method, kind)
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    assert found["png"] == str(tmp_path / "a.png")
    assert all(0 <= cell <= 1 for row in found["cells"] for cell in row)
    code, out, err = saccade(*argv)
    assert code == 0, err
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "┌" in out and ("untrained" in out) == (kind == "mixing")


@pytest.mark.parametrize("method, kind", [("offload", "cache"), ("offload+fetch", "cache"), ("longheads", "prefill")])
def test_show_says_where_there_is_no_pattern(saccade, tiny, tmp_path, method, kind):
    """Methods that give the answer themselves are drawn blank, one row per layer and head as for any other."""
    argv = ["show", method, "--model", tiny, "--length", 512, "--out", tmp_path / "a.png"]
    found = document(saccade(*argv, "--json"))
    assert found["kind"] == kind and "shows no pattern" in found["how"]
    assert kind != "cache" or len(found["cells"]) == 4 * 4
    code, out, err = saccade(*argv)
    assert code == 0 and "no pattern to draw" in out, err


def test_show_draws_the_arguments_it_is_given(saccade, tiny, tmp_path):
    argv = ["show", "streaming", "--model", tiny, "--length", 512, "--out", tmp_path / "a.png", "--json"]
    narrow = document(saccade(*argv, "--arg", "recent=8", "--arg", "sink=0", "--layer", 1, "--head", 2))
    wide = document(saccade(*argv, "--arg", "recent=200", "--arg", "sink=0"))
    assert narrow["density"] < 0.05 < 0.5 < wide["density"]
    assert (narrow["layer"], narrow["head"]) == (1, 2)
    # 490 tokens in 64 cells: 8 tokens are the last two cells of the last row
    assert [at for at, cell in enumerate(narrow["cells"][-1]) if cell] == [62, 63]


def test_run(saccade, tiny, tmp_path):
    (tmp_path / "p.txt").write_text("The code of amber-lantern is 4021932. " * 20)
    argv = ["run", "--model", tiny, "--prompt-file", tmp_path / "p.txt", "--question", "What is it?"]
    argv += ["--max-new-tokens", 4]
    found = document(saccade(*argv, "--plan", "streaming", "--json"))
    assert list(found)[:8] == ["model", "plan", "device", "dtype", "length", "answer", "ttft_s", "tpot_s"]
    assert 0 < found["density"] < 1 and found["kv_bytes"] > 0
    dense = document(saccade(*argv, "--json"))
    assert dense["density"] == 1.0 and dense["length"] == found["length"]
    code, out, _ = saccade(*argv)
    assert code == 0 and out.startswith(dense["answer"])


def test_run_says_that_there_is_no_answer(saccade, tiny, tmp_path, monkeypatch):
    from saccade.evaluate import measure

    real = measure.answers
    monkeypatch.setattr(measure, "answers", lambda *a, **k: [replace(one, text="") for one in real(*a, **k)])
    (tmp_path / "p.txt").write_text("It rained. " * 20)
    code, out, _ = saccade("run", "--model", tiny, "--prompt-file", tmp_path / "p.txt", "--max-new-tokens", 1)
    assert code == 0 and out.startswith("(no answer")


def test_run_warns_beyond_the_trained_length(saccade, tiny, tmp_path):
    (tmp_path / "p.txt").write_text("It rained. " * 800)
    code, out, err = saccade("run", "--model", tiny, "--prompt-file", tmp_path / "p.txt", "--max-new-tokens", 2)
    assert code == 0 and out
    assert "warning" in err and "2048" in err


def test_doctor(saccade, tiny):
    found = document(saccade("doctor", "--model", tiny, "--plan", "streaming", "--json"))
    assert found["calls"] == [4] * 4 and found["problems"] == []
    code, out, _ = saccade("doctor", "--model", tiny, "--plan", "dense")
    assert code == 0 and "no problems found" in out


def test_plan_show(saccade, tmp_path):
    rows = [
        [Assign((0, 1), "streaming", {"sink": 4, "recent": 8}), Assign((1,), "duo", {}, "cache")],
        [Assign((3,), "streaming", {"sink": 4, "recent": 16})],
    ]
    Plan.per_head(ModelShape(2, 4, 2, "small"), rows, note="a test").save(tmp_path / "plan.json")
    found = document(saccade("plan", "show", tmp_path / "plan.json", "--out", tmp_path / "plan.png", "--json"))
    assert found["maps"] == {"prefill": ["SS..", "...S"], "cache": [".D", ".."]}
    assert found["letters"] == {"streaming": "S", "duo": "D"}
    assert (tmp_path / "plan.png").read_bytes()[1:4] == b"PNG"
    code, out, _ = saccade("plan", "show", tmp_path / "plan.json")
    assert code == 0
    assert "small: 2 layers" in out and "S  streaming: 2 settings" in out and "a test" in out


def test_plan_show_obeys_no_control_characters_of_a_file(saccade, tmp_path):
    Plan.per_head(ModelShape(1, 1, 1, "a\x1b[2Jb"), [[]], note="red\x1b[31m\rgreen").save(tmp_path / "plan.json")
    code, out, _ = saccade("plan", "show", tmp_path / "plan.json")
    assert code == 0 and "a [2Jb: 1 layers" in out and "red [31m green" in out and "\x1b" not in out


def test_plan_show_reads_published_files(saccade, tmp_path):
    (tmp_path / "heads.tsv").write_text("0.1\t0.9\n0.8\t0.2\n")
    assert document(saccade("plan", "show", tmp_path / "heads.tsv", "--json"))["maps"] == {"cache": ["D.", ".D"]}
    code, _, err = saccade("plan", "show", tmp_path / "none.json")
    assert code == 2 and "no such file" in err


def test_bench_attend(saccade):
    argv = ["bench", "attend", "--length", 512, "--density", 0.3, "--dtype", "both", "--repeat", 1, "--width", 16]
    found = document(saccade(*argv, "--json"))
    wanted = ["impl", "peer", "device", "dtype", "length", "density", "ms", "peer_ms", "speedup"]
    assert [row["dtype"] for row in found["rows"]] == ["float32", "bfloat16"]
    assert all(list(row)[:9] == wanted for row in found["rows"])
    assert found["rows"][0]["impl"] == "tiled" and found["rows"][0]["peer"] == "sdpa"
    code, out, err = saccade(*argv)
    assert code == 0 and "speedup" in out and "1 of 1" in err
    code, _, err = saccade("bench", "attend", "--density", "0")
    assert code == 2 and "density" in err
