"""Kernels with NVSHMEM's own headers: in the emulator, and linked with its device library."""

import pytest
import torch
from cases import Case, bits, draw, results
from low_latency_runs import Form, check, one_round
from test_low_latency import SECONDS, buffer_of, run

from dsv3_kernels import emulator, jit
from dsv3_kernels.ep import (
    Topology,
    Tuning,
    internode,
    internode_kernels,
    lean_combine,
    lean_dispatch,
    low_latency_kernels,
    reference,
)
from dsv3_kernels.ep.calls import Calls
from dsv3_kernels.ep.transport import Shape
from dsv3_kernels.ep.tuning import rings_of
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

    assert kernel.cubin().resources.registers <= 128
    assert all(doorbells(kernel, ["nvshmemi_transfer_rma_nbi", "nvshmemi_transfer_amo_nonfetch"]))


class World:
    """`nvshmem.World`, of an emulated cluster."""

    def __init__(self, group, gpus):
        self._group, self._gpus, self.rank = group, gpus, group.rank

    def allocate(self, size):
        return self._group.symmetric((size,), torch.uint8)

    def mapped(self, memory):
        every = self._group.all_gather_object(emulator.current().address_of(memory))
        return [address * (r // self._gpus == self.rank // self._gpus) for r, address in enumerate(every)]

    def queue_pairs(self, count):
        return list(range(2, 2 + count))


@pytest.mark.parametrize("nodes, gpus", [(2, 2)])
def test_transports_over_a_world(nodes, gpus):
    """As ep.Buffer makes them on GPUs of several nodes: throughput and low latency."""
    case = Case(Topology(nodes, gpus), local_experts=2, hidden=144, num_topk=3, tokens=5, seed=4)
    inputs, form = draw(case), Form(hook=True)
    shape = Shape(case.num_experts, case.hidden, case.tokens, case.topk, case.topology)

    def program(rank, group):
        world, buffer = World(group, gpus), buffer_of(case, group)
        connection = low_latency_kernels.connect_nvshmem(world, shape)
        buffer._low_latency = low_latency_kernels.KernelLowLatency(shape, connection, SECONDS)
        fast = one_round(buffer, case, inputs, 0, rank, form)
        transport = internode.over_nvshmem(world, rings_of(shape, Tuning()), SECONDS)
        buffer._transport, buffer._calls = transport, Calls(shape, transport)
        got = buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
        assert buffer.status().transport == "nvshmem"
        y, _ = results(case, 0, rank, got.handle.rows)
        return fast, got, buffer.combine(y, got.handle, num_sms=2).x

    by_rank = emulator.VirtualCluster(nodes, gpus, 0, num_sms=4).run(program)
    check(case, inputs, 0, form, [fast for fast, _, _ in by_rank])
    want = reference.dispatch(inputs.x, inputs.topk_idx, None, case.num_experts)
    y = [results(case, 0, rank, len(part.origin))[0] for rank, part in enumerate(want)]
    home = reference.combine(y, want, [idx.shape[0] for idx in inputs.topk_idx], case.topology)
    for (_, got, x), part, expected in zip(by_rank, want, home, strict=True):
        assert torch.equal(bits(got.x), bits(part.x)) and torch.equal(got.topk_idx, part.topk_idx)
        assert torch.equal(bits(x), bits(expected))


def doorbells(kernel, calls):
    """In the functions of NVSHMEM that the linked kernel calls."""
    cubin = kernel.cubin()
    # A few words that live across NVSHMEM's calls, outside the loops that move rows.
    assert cubin.resources.spill_store_bytes <= 16
    for table in (b"nvshmemi_ibgda_device_state_d", b"nvshmemi_device_lib_version_d"):
        assert cubin.image.count(table) > 0
    text = disassemble.disassemble(cubin.image).text
    functions = {part.split(":")[0]: part for part in text.split(".text.") if ":\n" in part}
    assert cubin.name in functions
    return [
        sum(body.count("STG.E.64.MMIO.SYS") for name, body in functions.items() if call in name)
        for call in calls
    ]


@pytest.mark.parametrize(
    "kernel",
    [
        internode_kernels.DISPATCH,
        *(
            pytest.param(kernel, marks=pytest.mark.long)
            for kernel in (internode_kernels.COMBINE, lean_dispatch.DISPATCH[0], lean_combine.MOVE)
        ),
    ],
    ids=str,
)
def test_the_kernels_between_nodes_link(kernel):
    assert all(doorbells(kernel, ["nvshmemi_transfer_put_signal", "nvshmemi_transfer_amo_nonfetch"]))
