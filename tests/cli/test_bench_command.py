"""`saccade bench`: lists of lengths and densities, each verb's rows, and what it does not take."""

import argparse
import json

import pytest

from saccade.cli import bench


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
        (["decode", "--backward"], "bench decode: --backward is not used here, but by attend on cuda; leave it out"),
        (["attend", "--slash"], "bench attend: --slash is not used here, but by attend on cuda"),
        (["scan", "--density", "0.1"], "--density is not used here, but by attend, decode, select, e2e"),
        (["scan", "--kv-heads", "2"], "Used here: --length, --dtype, --heads, --width, --repeat, --decay"),
        (["select", "--layers", "32"], "--layers is not used here, but by e2e, e2e --methods"),
        (["e2e", "--methods", "quest", "--prefill", "pooled"], "bench e2e --methods: --prefill is not used here"),
        (["cook"], "invalid choice"),
    ],
)
def test_refuses(saccade, argv, said):
    code, out, err = saccade("bench", *argv)
    assert code == 2 and said in err and not out


def test_every_option_is_used_by_some_verb():
    parser = argparse.ArgumentParser()
    bench.arguments(parser)
    options = {action.dest for action in parser._actions} - {"help", "verb", "device", "threads"}
    assert options == {option for used in bench.USES.values() for option in used}
    # nothing is given by itself, or every verb would refuse it
    assert all(parser.get_default(option) is None for option in options) and set(bench.DEFAULTS) <= options
