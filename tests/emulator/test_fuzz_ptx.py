"""Damaged PTX gives an error or runs: never a crash, a hang or a read outside.

Each case damages the PTX of a real kernel in one to three places and loads it; if that works, it runs some
kernel of the text, with a bound on its steps. Cases run in a child process, so that a crash is a failed test
that names its seed: `python tests/emulator/test_fuzz_ptx.py SEED` repeats it.
"""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_kernels import emulator, gemm, jit
from dsv3_kernels.jit import Kernel
from dsv3_kernels.tensor_map import TensorMap

KERNELS = Path(__file__).parent / "kernels"
BATCH = 500
SECONDS_A_BATCH = 300
MAX_STEPS = 20_000


def corpus() -> list[tuple[str, list[str]]]:
    """PTX texts, and the kernels of each that may be run."""
    texts = []
    for path in sorted(KERNELS.glob("*.cu")):
        text = path.read_text()
        ptx = jit.compile_ptx(text, include_dirs=[KERNELS], defines={"BUG": 0}, lineinfo=True)
        texts.append((ptx, re.findall(r"^KERNEL\((\w+)\)", text, re.MULTILINE)))
    texts.append((gemm.config_of_tile(16, 64, swap=True).kernel.ptx().text, []))
    texts.append((Kernel("quantize.cuh", "quantize_1x128", ("Bf16", False)).ptx().text, []))
    return texts


TOKEN = re.compile(r"//.*|-?[%$\w.]+|\S")
NASTY = [
    *(
        "",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "<",
        ">",
        ";",
        ",",
        "+",
        "-",
        "@",
        "%",
        "\\",
        "\0",
        '"',
        "/*",
        "//",
        "é",
    ),
    *("-1", "0", "4294967296", "18446744073709551616", "9" * 26, "0x", "0f", "0fFFFFFFFF", "1e999"),
    *(".reg", ".b128", ".pred", ".shared", ".param", ".align", ".v4", ".s8", ".u64", "%r<4000000000>"),
    *("%f1", "%rd1", "%p", "$L__BB0_1", "_", "WARP_SZ", "%tid.x", "%clock64", "bra", "call", "ret", "exit"),
    *("trap", "bar.sync", "wgmma", "mbarrier"),
]


def damage(rng: random.Random, ptx: str) -> str:
    lines = ptx.split("\n")
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(lines))
        kind = rng.randrange(9)
        tokens = TOKEN.findall(lines[i]) or [""]
        at = rng.randrange(len(tokens))
        if kind == 0:
            del lines[i]
        elif kind == 1:
            lines.insert(rng.randrange(len(lines)), lines[i])
        elif kind == 2:
            lines[i] = lines[rng.randrange(len(lines))]
        elif kind == 3:
            tokens[at] = rng.choice(NASTY)
        elif kind == 4:
            tokens[at] = rng.choice(TOKEN.findall(lines[rng.randrange(len(lines))]) or [""])
        elif kind == 5:
            tokens[at] = re.sub(
                r"\d+", lambda m: str(int(m[0]) + rng.choice((-1, 1, 7, 1 << 31))), tokens[at]
            )
        elif kind == 6:
            parts = tokens[at].split(".")
            del parts[rng.randrange(len(parts))]
            tokens[at] = ".".join(parts)
        elif kind == 7:
            lines = lines[: i + 1]
        else:
            lines[i] = rng.choice(("{", "}", "(", "[", "@%p1 ", "/*")) * rng.choice((1, 3, 50_000))
        if kind in (3, 4, 5, 6):
            lines[i] = " ".join(tokens)
        lines = lines or [""]
    return "\n".join(lines)


def attempt(texts: list[tuple[str, list[str]]], seed: int) -> str:
    """Loads, and where possible runs, one damaged text; returns what happened."""
    rng = random.Random(seed)
    ptx, kernels = rng.choice(texts)
    damaged = damage(rng, ptx)
    name = rng.choice(kernels) if kernels else "none"
    given, out = torch.randn(64), torch.empty(64)
    maps = [TensorMap(t.view(2, 32), (2, 32), 0) for t in (given, out)]
    gpu = emulator.VirtualGPU(num_sms=2, seed=seed, max_steps=MAX_STEPS)
    try:
        gpu.launch(
            damaged,
            name,
            grid=(1, 1, 1),
            block=(64, 1, 1),
            args=[out, given, torch.zeros(640, dtype=torch.int32), *maps],
        )
    except emulator.EmulationError as error:
        assert str(error).strip()
        return type(error).__name__
    return "ran"


def run(first: int, count: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, __file__, str(first), str(count)],
        capture_output=True,
        text=True,
        timeout=SECONDS_A_BATCH,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])},
    )


def check(batch: int) -> None:
    try:
        done = run(batch * BATCH, BATCH)
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        pytest.fail(f"hangs after {output[-200:]!r}")
    assert done.returncode == 0, (
        f"exit status {done.returncode} after {done.stdout[-200:]!r}:\n{done.stderr[-2000:]}"
    )
    # Damage must be noticed often, and must often leave enough to load: else this tests little.
    outcomes = done.stdout.split()[1::2]
    assert len(outcomes) == BATCH
    assert outcomes.count("ran") >= BATCH // 50
    assert outcomes.count("EmulationError") + outcomes.count("UnsupportedInstructionError") >= BATCH // 3


@pytest.mark.parametrize("batch", range(2))
def test_damaged_ptx(batch):
    check(batch)


@pytest.mark.long
@pytest.mark.parametrize("batch", range(2, 42))
def test_much_damaged_ptx(batch):
    check(batch)


if __name__ == "__main__":
    all_texts = corpus()
    start = int(sys.argv[1])
    for case in range(start, start + int(sys.argv[2]) if len(sys.argv) > 2 else start + 1):
        print(case, end=" ", flush=True)
        print(attempt(all_texts, case), flush=True)
