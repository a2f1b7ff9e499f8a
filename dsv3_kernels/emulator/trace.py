"""What a machine did in virtual time, as JSON for Perfetto and chrome://tracing.

Virtual time counts cycles of an SM; a nanosecond of the viewer is one. Agents overlap in it: a warp has its
own clock, an engine is busy while it works, and a wait ends at the later of the waiter's clock and of what it
waits for. The rates are round figures of a Hopper (csrc/emulator/timing.hpp; links.py for memory and links):
an SM issues 4 instructions a cycle, one for each quarter of its warps; a wgmma m64nN takes N/2 cycles of the
SM's tensor core, 4096 FP8 multiply-adds a cycle; copies and bulk stores pass an SM's port at 64 bytes a
cycle. L2 and what ptxas makes of the PTX are not modelled. It is for comparing two schedules or protocols:
what overlaps, who waits for whom, which of the two is shorter. It does not predict seconds.

A process a block: a row a warp, then the copy engine (copies into its shared memory, where the bytes pass its
SM's port), the tensor core, and bulk stores. In a cluster of GPUs also a process a rank for its network, a
row a link with its messages, while the sender's port is busy with them.

A warp's slices leave no gap: "run", named by the class of instruction and, with line information, the source
line (of an inlined function, the line that calls it) that it is busy with, and "wait", named by what it waits
for. `args` hold the cycles, the PTX line and the source line with all that it was inlined at.
"""

from pathlib import PurePath
from typing import Any

_LINK = -4  # the unit of a row; engines are -1 to -3, warps 0 and up


def _short(source: str) -> str:
    """ "/a/gemm.cuh:64 inlined at /a/gemm.cuh:200" -> "gemm.cuh:64"."""
    return PurePath(source.split(" inlined at ")[0]).name


def chrome_trace(core: Any) -> dict[str, Any]:
    rows = core.trace_rows
    several = any(device for device, *_ in rows)
    events: list[dict[str, Any]] = []

    def describe(event: str, pid: int, tid: int, **args: Any) -> None:
        events.append({"ph": "M", "name": event, "pid": pid, "tid": tid, "args": args})

    pids: dict[tuple[int, int], int] = {}
    for device, cta, unit, _, sm, launch, kernel, block in rows:
        if (device, cta) in pids:
            continue
        pid = pids[device, cta] = len(pids)
        name = "network" if unit == _LINK else f"block {block} of {kernel}, launch {launch}, SM {sm}"
        describe("process_name", pid, 0, name=f"rank {device} / {name}" if several else name)
        describe("process_sort_index", pid, 0, sort_index=device * 2**20 + cta)
    for tid, (device, cta, unit, name, *_) in enumerate(rows):
        describe("thread_name", pids[device, cta], tid, name=name)
        describe("thread_sort_index", pids[device, cta], tid, sort_index=unit if unit >= 0 else 100 - unit)

    free_at = [0] * len(rows)
    for row, kind, start, end, name, place, source, line, cause, detail in sorted(
        core.trace_spans, key=lambda span: (span[0], span[2], span[3])
    ):
        # Messages that share a port take turns every few cycles: shown one behind the other.
        start = max(start, free_at[row]) if kind == "message" else start
        if start >= end:
            continue
        free_at[row] = end
        title = {"run": f"{name} {_short(place)}".rstrip(), "wait": f"wait for {cause}"}.get(kind, name)
        args: dict[str, Any] = {"cycles": [start, end], "ptx_line": line, "source": source}
        if kind in ("load", "store", "message"):
            args["bytes"] = detail
        if kind == "wgmma":
            args["warpgroup"] = detail
        if kind == "wait":
            args["instruction"] = name
        events.append(
            {
                "ph": "X",
                "pid": pids[rows[row][0], rows[row][1]],
                "tid": row,
                "ts": start / 1e3,
                "dur": (end - start) / 1e3,
                "cat": kind,
                "name": title,
                "args": args,
            }
        )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"dropped_slices": core.trace_dropped},
    }
