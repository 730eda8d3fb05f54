"""`saccade bench`: lists of lengths and densities, each verb's rows, and what it does not take."""

import json

import pytest


def test_scan_takes_several_lengths(saccade):
    code, out, err = saccade("bench", "scan", "--length", "64,90", "--heads", 2, "--width", 16, "--repeat", 1, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["length"] for row in found["rows"]] == [64] * 4 + [90] * 4
    assert found["command"].startswith("saccade bench scan") and "scan, decay per token" in err


def test_attend_takes_several_densities(saccade):
    argv = [
        "bench",
        "attend",
        "--length",
        "256,384",
        "--density",
        "0.3,0.6",
        "--width",
        16,
        "--block",
        32,
        "--repeat",
        1,
    ]
    code, out, err = saccade(*argv, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["length"] for row in rows] == [256, 256, 384, 384]
    assert rows[0]["density"] < 0.45 < rows[1]["density"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["attend", "--density", "0.1,2"], "numbers in (0, 1]"),
        (["attend", "--density", ","], "numbers in (0, 1]"),
        (["attend", "--peers", "flax"], "must be of sdpa-flash, sdpa-cudnn, flex"),
        (["attend", "--length", "0"], "whole number"),
        (["e2e"], "needs a GPU"),
        (["cook"], "invalid choice"),
    ],
)
def test_refuses(saccade, argv, said):
    code, out, err = saccade("bench", *argv)
    assert code == 2 and said in err and not out
