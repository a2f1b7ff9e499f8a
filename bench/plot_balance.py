"""Load balancing without a loss, drawn: `tiny` trains from a gate whose bias prefers the same experts for
every token, and only the bias moves against it (section 2.1.2 of the DeepSeek-V3 report).

    python -m bench.plot_balance  # writes docs/images/balance.png
"""

import argparse
import sysconfig
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv3_kernels.model import PRESETS, DeepSeekV3
from dsv3_kernels.nn import BF16

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "balance.png"
SKEW = 0.1
"""Of the bias at the start: scores near 0.5 differ by less, so that the first experts take every token."""

LEARNING_RATE, WARM_UP = 1e-3, 20


def text() -> Tensor:
    """Bytes of the standard library's source files."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def loads(steps: int, *, speed: float, batch: int = 8, length: int = 128, seed: int = 0) -> Tensor:
    """The share of the mean load that each expert had, [steps, MoE layers, experts]."""
    generator = torch.Generator().manual_seed(seed)
    source = text()
    model = DeepSeekV3(replace(PRESETS["tiny"], num_nextn_predict_layers=0), BF16)
    model.initialize(seed)
    gates = list(model.gates())
    for gate in gates:
        gate.bias.copy_(torch.linspace(SKEW, -SKEW, gate.bias.numel()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARM_UP), LEARNING_RATE / 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, decay], [WARM_UP])
    shares = []
    for _ in range(steps):
        starts = torch.randint(len(source) - length - 1, (batch, 1), generator=generator)
        window = source[starts + torch.arange(length + 1)].long()
        optimizer.zero_grad()
        model.losses(window).main.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shares.append(torch.stack([gate.load / gate.load.mean() for gate in gates]))
        for gate in gates:
            gate.balance(speed)
    return torch.stack(shares)


def draw(shares: Tensor, speed: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, layers, experts = shares.shape
    figure, axes = pyplot.subplots(1, layers, figsize=(4.5 * layers, 3.2), sharey=True, squeeze=False)
    for layer, axis in enumerate(axes[0]):
        axis.axhspan(0.8, 1.2, color="0.9", label="uniform ± 20 %")
        for expert in range(experts):
            color = pyplot.get_cmap("viridis")(expert / (experts - 1))
            axis.plot(range(1, steps + 1), shares[:, layer, expert], color=color, linewidth=1)
        axis.set(title=f"MoE layer {layer + 1}", xlabel="step", xlim=(1, steps), ylim=(0, None))
    axes[0][0].set_ylabel("tokens of an expert / mean")
    axes[0][0].legend(loc="upper right", frameon=False)
    figure.suptitle(f"A skewed gate evened out by its bias alone (speed {speed})")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--speed", type=float, default=5e-3, help="of the bias a step (default %(default)s)")
    parser.add_argument("--out", type=Path, default=IMAGE)
    options = parser.parse_args()
    shares = loads(options.steps, speed=options.speed)
    draw(shares, options.speed, options.out)
    first, last = shares[0], shares[-20:].mean(0)
    print(f"first step: {first.min():.2f} to {first.max():.2f} of the mean load of an expert")
    print(f"last 20 steps together: {last.min():.2f} to {last.max():.2f}")
    print(f"the worst of them alone: {shares[-20:].min():.2f} to {shares[-20:].max():.2f}")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
