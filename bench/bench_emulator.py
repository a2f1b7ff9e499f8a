"""How fast the virtual Hopper runs, on one core: `python -m bench.bench_emulator`.

The goal is an FP8 GEMM of 256x256x1024 in under 1.5 s with every check on. A figure is the time of one launch
on a virtual GPU that has loaded the PTX before, with and without checks; beside it warp instructions a second
(one counts for up to 32 lanes) and wgmma a second. Written to runs/bench/emulator.json.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

import dsv3_kernels as dsv3
from bench.report import Report, interleaved
from dsv3_kernels import emulator, gemm

SHAPE = (256, 256, 1024)
TILES = ((128, 128), (256, 128), (64, 32))


def gemm_case(tile: tuple[int, int]) -> Callable[[emulator.VirtualGPU], None]:
    """A launch of the FP8 GEMM with this tile, on a grid of at most two blocks."""
    m, n, k = SHAPE
    a, b = dsv3.quantize_1x128(torch.randn(m, k)), dsv3.quantize_128x128(torch.randn(n, k))
    out = torch.empty(m, n, dtype=torch.bfloat16)
    config = gemm.config_of_tile(*tile)
    ptx = config.kernel.ptx()
    prepared = gemm.prepare(config, m, k, n, groups=1, num_sms=2)
    arguments = prepared.arguments(gemm.operands(a.data, a.scales, b.data, b.scales, out, None))

    def launch(gpu: emulator.VirtualGPU) -> None:
        gpu.launch(
            ptx.text,
            ptx.name,
            grid=(2, 1, 1),
            block=(config.threads, 1, 1),
            args=arguments,
            shared_bytes=config.shared_bytes,
        )

    return launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each pair of figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("emulator")
    for tile in TILES:
        launch = gemm_case(tile)
        gpus = [emulator.VirtualGPU(num_sms=2, checks=checks) for checks in (True, False)]
        for gpu in gpus:
            launch(gpu)
        counters = gpus[0].counters
        times = interleaved(*(partial(launch, gpu) for gpu in gpus), seconds=arguments.seconds)
        for checks, taken in zip(("on", "off"), times, strict=True):
            fastest = min(taken)
            facts = {
                "instructions_per_s": counters["instructions"] / fastest,
                "wgmma_per_s": counters["wgmma"] / fastest,
            }
            name = f"fp8_gemm {'x'.join(map(str, SHAPE))} tile {tile[0]}x{tile[1]} checks {checks}"
            print(report.add(name, taken, **facts))
    print(f"written: {report.write()}")


if __name__ == "__main__":
    main()
