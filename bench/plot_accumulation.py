"""What the tensor core's 14-bit accumulator costs as K grows, and what promotion to FP32 every 128 saves.

Two matrices of e4m3 values, drawn normal or uniform in 0..1, are multiplied in the bit-accurate model of
Hopper's FP8 tensor core: once in its accumulator alone, once promoted. The error of a result is its distance
from the exact one, relative to the root mean square of the exact ones; plotted is the largest of all results.
"""

import argparse
from pathlib import Path

import torch

import dsv3_kernels as dk
from bench.report import RESULTS, Report
from dsv3_kernels import reference

DRAWS = {"normal": torch.randn, "uniform in 0..1": torch.rand}


def largest_errors(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """(raw, promoted) for a·bᵀ."""
    exact = a.double() @ b.double().t()
    promoted = torch.zeros(exact.shape)
    for k in range(0, a.shape[1], 128):
        promoted += reference.tensor_core_dot(a[:, k : k + 128], b[:, k : k + 128])
    size = exact.square().mean().sqrt()
    raw = reference.tensor_core_dot(a, b)
    return tuple(((result - exact).abs().max() / size).item() for result in (raw, promoted))


def measure(ks: list[int], rows: int, seeds: int, report: Report) -> dict[str, list[float]]:
    """Median of the largest errors over the seeds, by curve; each K is also a line on the terminal."""
    curves: dict[str, list[float]] = {}
    for name, draw in DRAWS.items():
        for k in ks:
            pairs = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                a, b = (reference.decode(dk.quantize_1x128(draw(rows, k)).data) for _ in range(2))
                pairs.append(largest_errors(a, b))
            for kind, errors in zip(
                ("accumulator alone", "promoted every 128"), zip(*pairs, strict=True), strict=True
            ):
                percent = [100 * error for error in errors]
                print(report.add(f"{name}, {kind}, K={k}", percent, "%"))
                curves.setdefault(f"{name}, {kind}", []).append(sorted(percent)[len(percent) // 2])
    return curves


def plot(ks: list[int], curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, errors in curves.items():
        distribution = name.split(",")[0]
        style = "-" if "alone" in name else "--"
        axes.loglog(ks, errors, style, marker="o", color=f"C{list(DRAWS).index(distribution)}", label=name)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set(
        xlabel="K", ylabel="largest error, % of the RMS result", title="FP8 GEMM in Hopper's tensor core"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "accumulation.png", help="the PNG (%(default)s)"
    )
    parser.add_argument("--rows", type=int, default=64, help="rows of both matrices (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="pairs of matrices a point (%(default)s)")
    options = parser.parse_args()
    ks = [128 << i for i in range(7)]
    report = Report("accumulation")
    plot(ks, measure(ks, options.rows, options.seeds, report), options.out)
    print(f"written: {options.out} and {report.write()}")


if __name__ == "__main__":
    main()
