"""Draw what `bench/gpu.sh` measured: speed-up against length and against density, for each peer.

python bench/plot_gpu.py            # bench/results/*-h200.json -> docs/speedup-h200.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from saccade.evaluate.report.plot import new_figure

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"sdpa-cudnn": "#1c7ed6", "sdpa-flash": "#0ca678", "flex": "#d9480f"}
NEAR = 0.25  # a measured density this far from the one asked for, as a share of it, still counts as it


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--gpu", default="h200", help="end of the files' names (h200)")
    parser.add_argument("--density", type=float, default=0.1, help="of the picture against length (0.1)")
    parser.add_argument("--out", type=Path, help="an .svg or .png (docs/speedup-GPU.svg)")
    args = parser.parse_args()
    out = args.out or ROOT / "docs" / f"speedup-{args.gpu}.svg"
    draw(read(args.results, args.gpu), args.density, out, args.gpu)
    print(out)


def read(folder: Path, gpu: str) -> list[dict[str, Any]]:
    """The rows of attention forwards, of all files."""
    rows = [row for file in sorted(folder.glob(f"attend*-{gpu}.json")) for row in json.loads(file.read_text())["rows"]]
    rows = [row for row in rows if row.get("direction") == "forward"]
    if not rows:
        raise SystemExit(f"no rows of attention in {folder}/attend*-{gpu}.json; run bench/gpu.sh {folder}")
    return rows


def draw(rows: list[dict[str, Any]], density: float, path: Path, gpu: str) -> None:
    """Two panels: against length at one density, against density at one length."""
    import matplotlib

    # the same rows give the same file
    matplotlib.rcParams["svg.hashsalt"] = "saccade"
    figure = new_figure((9.0, 4.0))
    left, right = figure.subplots(1, 2)
    blocks = [row for row in rows if row["pattern"] == "blocks"]
    # the length that was measured at most densities
    pairs = {(row["length"], row["density"]) for row in blocks}
    fixed = max({n for n, _ in pairs}, key=lambda length: (sum(n == length for n, _ in pairs), length))
    _lines(left, [row for row in blocks if abs(row["density"] - density) <= NEAR * density], "length")
    slash = [row for row in rows if row["pattern"] != "blocks"]
    _lines(left, slash, "length", style="--", what=", columns and diagonals")
    _lines(right, [row for row in blocks if row["length"] == fixed], "density")
    left.set_title(f"density {density:g}", fontsize=9)
    right.set_title(f"{fixed} tokens", fontsize=9)
    lengths = sorted({row["length"] for row in rows})
    shares = sorted({round(row["density"], 2) for row in blocks if row["length"] == fixed})
    for axis, name, ticks, labels in (
        (left, "tokens", lengths, [f"{n // 1024}k" for n in lengths]),
        (right, "share of the causal pairs that is read", shares, [f"{share:g}" for share in shares]),
    ):
        axis.axhline(1.0, color="#868e96", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        tall = [n for n in (0.5, 1, 2, 5, 10, 20, 50, 100) if axis.get_ylim()[0] <= n <= axis.get_ylim()[1]]
        axis.set_yticks(tall, [f"{n:g}x" for n in tall], minor=False)
        axis.set_xticks(ticks, labels, minor=False)
        axis.tick_params(which="minor", length=0, labelbottom=False, labelleft=False)
        axis.set_xlabel(name, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(True, linewidth=0.3, alpha=0.5)
    left.set_ylabel("speed-up", fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.suptitle(
        f"block-sparse attention forwards against dense attention and FlexAttention, {gpu.upper()}", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _lines(axis: Any, rows: list[dict[str, Any]], key: str, style: str = "-", what: str = "") -> None:
    """A line for each peer."""
    for peer, color in PEERS.items():
        mine = sorted((row[key], row["speedup"]) for row in rows if row["peer"] == peer)
        if mine:
            x, y = zip(*mine, strict=True)
            axis.plot(x, y, style, marker="o", markersize=3, linewidth=1.2, color=color, label=f"against {peer}{what}")


if __name__ == "__main__":
    main()
