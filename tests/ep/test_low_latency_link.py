"""Low latency's kernel with NVSHMEM's own headers: in the emulator, and linked with its device library."""

import pytest
from cases import Case, draw
from low_latency_runs import Form, check
from test_low_latency import run

from dsv3_kernels import jit
from dsv3_kernels.ep import Topology, low_latency_kernels
from dsv3_kernels.jit import disassemble, toolchain

try:
    toolchain.nvshmem_headers()
except jit.ToolchainError as error:
    pytest.skip(f"NVSHMEM's headers: {error}", allow_module_level=True)


def test_the_kernel_of_a_cluster(monkeypatch):
    """The PTX that a cluster links: bit-equal in the emulator; linked, its puts ring a NIC's doorbell."""
    kernel = low_latency_kernels.kernel(2, emulated=False)
    assert kernel.nvshmem and not kernel.defines
    monkeypatch.setattr(low_latency_kernels, "kernel", lambda nodes, emulated: kernel)
    case = Case(Topology(2, 2), local_experts=2, hidden=144, num_topk=3, tokens=5, seed=3)
    rounds, forms = [draw(case, round_) for round_ in range(3)], [Form(), Form(fp8=False), Form(hook=True)]
    cluster, by_rank = run(case, rounds, forms, 0)
    for i, (inputs, form) in enumerate(zip(rounds, forms, strict=True)):
        check(case, inputs, i, form, [got[i] for got in by_rank])
    assert sum(link["messages"] for link in cluster.counters["links"].values()) > 0

    cubin = kernel.cubin()
    assert cubin.resources.spill_store_bytes == 0 and cubin.resources.registers <= 128
    for table in (b"nvshmemi_ibgda_device_state_d", b"nvshmemi_device_lib_version_d"):
        assert cubin.image.count(table) > 0
    text = disassemble.disassemble(cubin.image).text
    functions = {part.split(":")[0]: part for part in text.split(".text.") if ":\n" in part}
    assert cubin.name in functions
    for call in ("nvshmemi_transfer_rma_nbi", "nvshmemi_transfer_amo_nonfetch"):
        doorbells = [body.count("STG.E.64.MMIO.SYS") for name, body in functions.items() if call in name]
        assert sum(doorbells) > 0, call
