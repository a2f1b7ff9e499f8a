"""pytest-benchmark cases of the CPU backend: `pytest bench --benchmark-only`.

Each case stands in pytest-benchmark's table. Its speed against a PyTorch peer, both called in turn and both
at their fastest, is printed below the cases and written to runs/bench/.
"""

import os
from collections.abc import Callable

import pytest
import torch

from bench.report import Report, interleaved

_REPORTS: dict[str, Report] = {}
_LINES: list[str] = []


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def against(benchmark, request) -> Callable[..., None]:
    """`against(name, op, peer_name, peer, **facts)` times op and peer."""
    bench = request.module.__name__.rpartition("bench_")[2]

    def measure(
        name: str, op: Callable[[], object], peer_name: str, peer: Callable[[], object], **facts: object
    ):
        benchmark(op)
        op_times, peer_times = interleaved(op, peer)
        facts = {"peer": peer_name, "speed_against_peer": min(peer_times) / min(op_times), **facts}
        benchmark.extra_info.update(facts)
        _LINES.append(_REPORTS.setdefault(bench, Report(bench)).add(name, op_times, **facts))

    return measure


def pytest_terminal_summary(terminalreporter):
    if not _LINES:
        return
    terminalreporter.section("against PyTorch, same run")
    for line in _LINES:
        terminalreporter.write_line(line)
    for report in _REPORTS.values():
        terminalreporter.write_line(f"written: {report.write()}")
