"""What a cubin really does: its SASS, through nvdisasm (which only tests and benchmarks need)."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from . import toolchain

# `        /*0a30*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;`
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
_REGISTER = re.compile(r"\bR(\d+)\b")
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


@dataclass(frozen=True)
class Sass:
    """The machine code of an image, with the subroutines that it calls, and how often each opcode occurs."""

    text: str
    opcodes: Counter[str]  # with modifiers, as in "LDG.E.128.CONSTANT"

    def count(self, opcode: str) -> int:
        """Occurrences of an opcode with any further modifiers: "LDG", "LDG.E.128"."""
        return sum(n for name, n in self.opcodes.items() if name == opcode or name.startswith(opcode + "."))

    def widths(self, opcode: str) -> Counter[int]:
        """How many bits a thread moves with the occurrences of a load or store: {128: 4, 32: 1}."""
        widths: Counter[int] = Counter()
        for name, n in self.opcodes.items():
            head, *modifiers = name.split(".")
            if head == opcode:
                widths[next((_BITS[m] for m in modifiers if m in _BITS), 32)] += n
        return widths

    @property
    def local_memory(self) -> int:
        """Loads and stores of local memory: spills, or arrays that are not in registers."""
        return self.count("LDL") + self.count("STL")

    @property
    def registers(self) -> int:
        """Registers a thread that the code names; what ptxas allocates is this, rounded up."""
        return 1 + max((int(number) for number in _REGISTER.findall(self.text)), default=-1)


def disassemble(image: bytes) -> Sass:
    """The SASS of a cubin. Raises `ToolchainError` without nvdisasm, `ValueError` for a bad image."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [str(toolchain.nvdisasm()), "--print-code", file.name]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise ValueError(f"nvdisasm refused the image: {done.stderr.strip()}")
    return Sass(done.stdout, Counter(_INSTRUCTION.findall(done.stdout)))
