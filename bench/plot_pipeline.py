"""The pipeline of the FP8 GEMM over virtual time, drawn from the emulator's trace of one SM.

Two 128x128 tiles, one after the other: the producer warp asks the copy engine for stages; two math warpgroups
feed the tensor core in turn, each promoting its sums while the other's wgmma run; a finished tile leaves by
bulk stores under the next tile's main loop. The time is virtual (dsv3_kernels/emulator/trace.py): it shows
what overlaps, not how many seconds it takes.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import dsv3_kernels as dsv3
from bench.report import RESULTS
from dsv3_kernels import emulator, gemm

TILE = (128, 128)
ROWS = {
    "warp 8": "producer warp",
    "copy engine": "copy engine",
    "tensor core": "tensor core",
    "warp 0": "math warpgroup 0",
    "warp 4": "math warpgroup 1",
    "bulk stores": "bulk stores",
}
# Okabe and Ito's palette, which the colour-blind can tell apart too.
COLORS = {
    "TMA load": "#56B4E9",
    "wgmma of warpgroup 0": "#D55E00",
    "wgmma of warpgroup 1": "#F0B85A",
    "promotion to FP32": "#009E73",
    "other instructions": "#5B6770",
    "waiting": "#E6E8EA",
    "TMA store": "#CC79A7",
}


def trace(k: int, tiles: int, seed: int) -> list[dict[str, Any]]:
    """Events of a GEMM of one column of tiles on one SM."""
    torch.manual_seed(seed)
    rows, columns = TILE[0] * tiles, TILE[1]
    a, b = dsv3.quantize_1x128(torch.randn(rows, k)), dsv3.quantize_128x128(torch.randn(columns, k))
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    with emulator.virtual_gpu(num_sms=1, schedule="timed") as gpu:
        launch = gemm.prepare(gemm.config_of_tile(*TILE), rows, k, columns, groups=1, num_sms=1)
        launch(*gemm.operands(a.data, a.scales, b.data, b.scales, out, None))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        gpu.trace(path)
        return json.loads(path.read_text())["traceEvents"]


def meaning(event: dict[str, Any]) -> str:
    """What a slice stands for, a key of COLORS."""
    match event["cat"]:
        case "load":
            return "TMA load"
        case "store":
            return "TMA store"
        case "wgmma":
            return f"wgmma of warpgroup {event['args']['warpgroup']}"
        case "wait":
            return "waiting"
    return "promotion to FP32" if event["name"].startswith("float ") else "other instructions"


def plot(events: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    slices = [e for e in events if e["ph"] == "X" and names[e["tid"]] in ROWS]
    end = max(e["args"]["cycles"][1] for e in slices)
    pyplot.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans"})
    figure, axes = pyplot.subplots(figsize=(12, 3.9), layout="constrained")
    for place, row in enumerate(ROWS):
        axes.axhline(place, color="#D0D4D8", linewidth=0.8, zorder=0)
        for what, color in COLORS.items():
            bars = [
                (start, stop - start)
                for e in slices
                if names[e["tid"]] == row and meaning(e) == what
                for start, stop in [e["args"]["cycles"]]
            ]
            height = 0.3 if what == "waiting" else 0.74
            axes.broken_barh(
                bars, (place - height / 2, height), facecolors=color, edgecolor="white", linewidth=0.4
            )
    stores = sorted(e["args"]["cycles"] for e in slices if meaning(e) == "TMA store")
    per_tile = TILE[0] * TILE[1] // (64 * 64)  # a store takes 64 rows of 64 columns
    for tile in range(len(stores) // per_tile):
        begin = stores[tile * per_tile][0]
        axes.text(begin - 60, len(ROWS) - 1, f"tile {tile}", ha="right", va="center", backgroundcolor="white")
    axes.set_yticks(range(len(ROWS)), list(ROWS.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("virtual time, cycles of the SM")
    handles = [patches.Patch(facecolor=color, label=what) for what, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, columnspacing=1.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "pipeline.png", help="the PNG (%(default)s)")
    parser.add_argument("--k", type=int, default=768, help="depth of the GEMM (%(default)s)")
    parser.add_argument(
        "--tiles", type=int, default=2, help="128x128 tiles, one after the other (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data (%(default)s)")
    options = parser.parse_args()
    plot(trace(options.k, options.tiles, options.seed), options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
