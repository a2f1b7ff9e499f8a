"""What a machine did in virtual time, as JSON for Perfetto and chrome://tracing.

A process an SM; in it a row for its copy engine, one for its tensor core, and one a warp. Time is virtual:
a nanosecond of the viewer is one cycle of the SM (1.755 GHz). A warp issues an instruction a cycle, moves
free; a wgmma m64nN takes N/2 cycles of its SM's tensor core, which is the peak rate; the copy engine moves
64 bytes a cycle, 600 cycles after the request. Waits last until what they wait for has happened. So it
shows what overlaps with what, at rates that are round figures; it does not predict seconds.

A warp's slices: `category` "wait", named by the instruction that waits, and "run", named by the source line
(without line information: the class of instruction) that most of it went to. Together they leave no gap.
An engine's slices: "load" and "store" of the copy engine, where the bytes cross its port, and "wgmma".
"""

from pathlib import PurePath
from typing import Any

ENGINES = {-2: "copy engine", -1: "tensor core"}


def _short(source: str) -> str:
    """ "/a/gemm.cuh:64 inlined at /a/gemm.cuh:200" -> "gemm.cuh:64"."""
    return PurePath(source.split(" inlined at ")[0]).name


def chrome_trace(core: Any) -> dict[str, Any]:
    rows = core.trace_rows
    several_launches = len({launch for _, _, unit, launch, _, _ in rows if unit >= 0}) > 1
    several_devices = any(device for device, *_ in rows)
    processes: dict[tuple[int, int], int] = {}
    for device, sm in sorted({(device, sm) for device, sm, *_ in rows}):
        processes[device, sm] = len(processes)
    events: list[dict[str, Any]] = []

    def describe(event: str, pid: int, tid: int, **args: Any) -> None:
        events.append({"ph": "M", "name": event, "pid": pid, "tid": tid, "args": args})

    for (device, sm), pid in processes.items():
        name = f"SM {sm}"
        describe("process_name", pid, 0, name=f"rank {device} / {name}" if several_devices else name)
    in_order = sorted(range(len(rows)), key=lambda tid: (rows[tid][3], rows[tid][5][::-1], rows[tid][2]))
    for place, tid in enumerate(in_order):
        device, sm, unit, launch, kernel, block = rows[tid]
        if unit < 0:
            name = ENGINES[unit]
        else:
            index = block[0] if not block[1] and not block[2] else tuple(block)
            name = f"block {index} / warp {unit}"
            if several_launches:
                name = f"launch {launch} {kernel} / {name}"
        pid = processes[device, sm]
        describe("thread_name", pid, tid, name=name)
        describe("thread_sort_index", pid, tid, sort_index=place)
    for row, category, start, end, name, source, line in core.trace_spans:
        device, sm, *_ = rows[row]
        events.append(
            {
                "ph": "X",
                "pid": processes[device, sm],
                "tid": row,
                "ts": start / 1e3,
                "dur": (end - start) / 1e3,
                "cat": category,
                "name": _short(source) if category == "run" and source else name,
                "args": {"cycles": [start, end], "ptx_line": line, "source": source},
            }
        )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"dropped_slices": core.trace_dropped},
    }
