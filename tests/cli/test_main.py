import json
import os
import subprocess
import sys

import pytest

from saccade.cli import main as cli
from saccade.core.errors import InputError

COMMAND = [sys.executable, "-m", "saccade"]


def one_line(err):
    lines = err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["show", "minferense"], "did you mean 'minference'"),
        (["show", "streaming", "--arg", "recnt=3"], "did you mean 'recent'"),
        (["show", "streaming", "--arg", "recent"], "key=value"),
        (["show", "streaming", "--layer", "9"], "0..3"),
        (["demo", "streaming", "trishap", "--length", "1024"], "did you mean 'trishape'"),
        (["demo", "lightning", "--length", "1024"], "own weights"),
        (["demo", "--length", "300"], "too few"),
        (["demo", "--length", "0"], "--length"),
        (
            ["show", "streaming", "--length", "300"],
            "saccade: 300 tokens are too few for a document with 1 planted fact",
        ),
        (["show", "streaming", "--length", "300"], "use a length of 320 or more"),
        (["doctor", "--plan", "tidal", "--length", "1"], "length must be >= 2 tokens, got 1"),
        (["eval", "--methods", "fetch@0.1", "--lengths", "400", "--out", "{tmp}/e"], "name fetch@0.1+offload"),
        (["demo", "duo", "--length", "1024"], "saccade.fit.duo"),
        (["run", "--prompt-file", "/nowhere.txt"], "/nowhere.txt: No such file"),
        (["run", "--prompt-file", "/"], "directory"),
        (["eval", "--methods", "dense", "--tasks", "neddle", "--out", "{tmp}"], "did you mean 'needle'"),
        (["eval", "--out", "{tmp}"], "nothing to compare"),
        (["lm-eval", "--tasks", "any", "--fewshot", "-1"], "must be >= 0"),
        (["eval", "--methods", "dense", "--lengths", "2048,x", "--out", "{tmp}"], "whole number"),
        (["doctor", "--plan", "{tmp}/none.json"], "no such file"),
        (["doctor", "--plan", "streaming", "--device", "abacus"], "unknown device"),
        (["frob"], "invalid choice"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(saccade, tiny, tmp_path, argv, said):
    argv = [part.replace("{tmp}", str(tmp_path)) for part in argv]
    if argv[0] != "frob":
        argv += ["--model", tiny]
    code, out, err = saccade(*argv)
    assert (code, out) == (2, "")
    assert said in one_line(err)


@pytest.mark.parametrize("broken", ["missing", "empty", "truncated"])
def test_a_model_that_cannot_be_read(saccade, tiny, tmp_path, broken):
    import shutil

    folder = tmp_path / "model"
    if broken != "missing":
        shutil.copytree(tiny, folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(b"" if broken == "empty" else weights.read_bytes()[:5000])
    code, out, err = saccade("doctor", "--plan", "streaming", "--model", folder)
    assert (code, out) == (2, "")
    # not what the hub thinks of the name
    assert ("there is no such folder" if broken == "missing" else "no model could be read") in one_line(err)


def test_a_binary_prompt(saccade, tiny, tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    code, _, err = saccade("run", "--prompt-file", tmp_path / "x", "--model", tiny)
    assert code == 2 and "not a text file" in one_line(err)
    (tmp_path / "y").write_text("  \n")
    code, _, err = saccade("run", "--prompt-file", tmp_path / "y", "--model", tiny)
    assert code == 2 and "no text" in one_line(err)


def test_ctrl_c_is_130(saccade, monkeypatch):
    def stopped(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("saccade.cli.list.run", stopped)
    assert saccade("list") == (130, "", "saccade: interrupted\n")


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    def broken(args):
        raise RuntimeError("a fault")

    monkeypatch.setattr("saccade.cli.list.run", broken)
    with pytest.raises(RuntimeError):
        cli.main(["list"])


def test_a_message_of_several_lines_becomes_one(saccade, monkeypatch):
    def refused(args):
        raise InputError("first\n  second")

    monkeypatch.setattr("saccade.cli.list.run", refused)
    assert saccade("list") == (2, "", "saccade: first second\n")


def test_as_a_process():
    done = subprocess.run([*COMMAND, "list", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)[0]["name"] == "dense"
    done = subprocess.run([*COMMAND, "show", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    one_line(done.stderr)


def test_nobody_reads_the_output():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run([*COMMAND, "list"], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""


def test_help_needs_no_torch():
    code = "import sys; from saccade.cli.main import parser; parser(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_commands_name_each_other(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in cli.COMMANDS)
