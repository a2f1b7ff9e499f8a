"""What can go wrong in an emulated kernel."""


class EmulationError(RuntimeError):
    """A kernel could not be loaded or run. The fields say where, as far as it applies.

    message, kernel, block (x, y, z), rank, warp (in the block), lane, ptx_line, source ("file.cu:12";
    inlined code
    names all its places, innermost first), seed.
    """

    def __init__(
        self,
        message: str,
        *,
        kernel: str = "",
        block: tuple[int, int, int] | None = None,
        rank: int | None = None,
        warp: int | None = None,
        lane: int | None = None,
        ptx_line: int | None = None,
        source: str = "",
    ) -> None:
        super().__init__(message)
        self.message, self.kernel, self.block, self.rank = message, kernel, block, rank
        self.warp, self.lane, self.ptx_line, self.source = warp, lane, ptx_line, source
        self.seed: int | None = None

    def __str__(self) -> str:
        place = [f"kernel {self.kernel}"] if self.kernel else []
        for name in ("rank", "block", "warp", "lane"):
            value = getattr(self, name)
            place += [] if value is None else [f"{name} {value}"]
        place += [] if self.ptx_line is None else [f"PTX line {self.ptx_line}"]
        place += [self.source] if self.source else []
        place += [] if self.seed is None else [f"seed {self.seed}"]
        return self.message + (f"\n  at {', '.join(place)}" if place else "")


class DeadlockError(EmulationError):
    """Nothing can move; the message lists every blocked warp and what it waits for."""


class HazardError(EmulationError):
    """The program is wrong, though this run may have been right: a race, a missing fence, ..."""


class MemoryAccessError(EmulationError):
    """Out of bounds, misaligned, freed, or the wrong state space."""


class UnsupportedInstructionError(EmulationError):
    """The PTX holds an instruction that the emulator does not execute; found when it is loaded."""
