"""The pipeline of the FP8 GEMM over virtual time, drawn from the emulator's trace of one SM.

Rows: the producer warp, the copy engine, the tensor core, and a warp of each math warpgroup, which waits for
wgmma and promotes its sums while the other's wgmma run. The time is virtual, at the rates that
dsv3_kernels/emulator/trace.py names: it shows what overlaps, not how many seconds it takes.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from report import RESULTS

import dsv3_kernels as dk
from dsv3_kernels import emulator, gemm

TILE = (128, 128)
COLORS = {"load": "#4c78a8", "store": "#9ecae9", "wgmma": "#e45756", "run": "#54a24b", "wait": "#e4e4e4"}
LABELS = {
    "load": "TMA load",
    "store": "TMA store",
    "wgmma": "wgmma",
    "run": "warp runs (issue, promotion)",
    "wait": "warp waits",
}


def trace(k: int, tiles: int, seed: int) -> list[dict[str, Any]]:
    """Events of a GEMM of one column of tiles on one SM."""
    torch.manual_seed(seed)
    rows, columns = TILE[0] * tiles, TILE[1]
    a, b = dk.quantize_1x128(torch.randn(rows, k)), dk.quantize_128x128(torch.randn(columns, k))
    config = gemm.config_of_tile(*TILE)
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    ptx = config.kernel.ptx(lineinfo=True)
    gpu = emulator.VirtualGPU(num_sms=1, seed=seed)
    gpu.launch(
        ptx.text,
        ptx.name,
        grid=(1, 1, 1),
        block=(config.threads, 1, 1),
        args=gemm.arguments(config, a.data, a.scales, b.data, b.scales, out),
        shared_bytes=config.shared_bytes,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        gpu.trace(path)
        return json.loads(path.read_text())["traceEvents"]


def plot(events: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    rows = {
        "block 0 / warp 8": "producer warp",
        "copy engine": "copy engine",
        "tensor core": "tensor core",
        "block 0 / warp 0": "math warpgroup 0",
        "block 0 / warp 4": "math warpgroup 1",
    }
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    figure, axes = pyplot.subplots(figsize=(10, 3), layout="constrained")
    for place, row in enumerate(rows):
        for category, color in COLORS.items():
            bars = [
                (start, end - start)
                for e in events
                if e["ph"] == "X" and e["cat"] == category and names[e["tid"]] == row
                for start, end in [e["args"]["cycles"]]
            ]
            axes.broken_barh(bars, (place - 0.38, 0.76), facecolors=color, edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(rows)), list(rows.values()))
    axes.invert_yaxis()
    axes.margins(x=0)
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("virtual time, cycles of the SM")
    handles = [patches.Patch(color=COLORS[category], label=LABELS[category]) for category in COLORS]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "pipeline.png", help="the PNG (%(default)s)")
    parser.add_argument("--k", type=int, default=1024, help="depth of the GEMM (%(default)s)")
    parser.add_argument(
        "--tiles", type=int, default=2, help="128x128 tiles, one after the other (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and the schedule (%(default)s)")
    options = parser.parse_args()
    plot(trace(options.k, options.tiles, options.seed), options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
