"""Peers' memory over NVLink, with stand-ins for CUDA and torch's symmetric memory; ranks are threads."""

import time
import types

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import Case, bits, draw, results

from dsv3_kernels import emulator, ep
from dsv3_kernels.ep import Topology, Tuning, buffer, nvlink, reference
from dsv3_kernels.ep.calls import Calls
from dsv3_kernels.ep.design import design_of
from dsv3_kernels.ep.transport import Shape
from dsv3_kernels.quantized import QuantizedTensor

RANKS = 4


class Exchange:
    """The checked exchange of integers, among the ranks of an emulated cluster."""

    def __init__(self, group):
        self.group, self.rank, self.size = group, group.rank, group.size()

    def all_gather(self, op, values, device):
        assert all(type(int(v)) is int and 0 <= v < 1 << 63 for v in values)
        return self.group.all_gather_object([int(v) for v in values])


class System:
    """A node as `nvlink` sees it; tests change what they need."""

    def __init__(self, monkeypatch):
        self.backend, self.capability = "nccl", (9, 0)
        self.uuids = [f"GPU-{i}" for i in range(RANKS)]
        self.boots = ["one host"] * RANKS
        self.visible, self.apart = RANKS, set()  # pairs of GPUs without peer access
        self.module, self.mapped, self.offset, self.broken = self, [], 0, {}
        self.full = set()  # ranks without memory
        for name, value in {
            "get_device_capability": lambda device: self.capability,
            "get_device_properties": lambda device: types.SimpleNamespace(uuid=self.uuids[device.index]),
            "device_count": lambda: self.visible,
            "can_device_access_peer": lambda a, b: a != b and {a, b} not in map(set, self.apart),
            "synchronize": lambda device: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(nvlink.dist, "get_backend", lambda group: self.backend)
        monkeypatch.setattr(nvlink, "_symmetric_memory", lambda: self.module)
        boots = types.SimpleNamespace(is_file=lambda: True, read_text=lambda: self.boots[self.rank()])
        monkeypatch.setattr(nvlink, "_BOOT_ID", boots)

    @staticmethod
    def rank():
        return emulator.current()._rank

    # torch.distributed._symmetric_memory

    def empty(self, size, *, dtype, device):
        assert device == torch.device("cuda", self.rank())
        if self.rank() in self.full:
            raise RuntimeError("CUDA error 2: out of memory")
        return torch.full((size,), 0xAA, dtype=dtype)

    def rendezvous(self, memory, group):
        self.mapped.append(self.rank())
        if self.rank() in self.broken:
            raise RuntimeError(self.broken[self.rank()])
        addresses = group.all_gather_object(memory.data_ptr() - self.offset)
        return types.SimpleNamespace(buffer_ptrs=addresses, offset=self.offset, keeps=memory)

    def connect(self, size=96, topology=None):
        shape = Shape(RANKS, 64, 8, 2, topology or Topology(1, RANKS))

        def program(rank, group):
            return nvlink.connect(Exchange(group), shape, torch.device("cuda", rank), size)

        return emulator.VirtualCluster(1, RANKS).run(program)


@pytest.fixture
def system(monkeypatch):
    return System(monkeypatch)


@pytest.mark.parametrize("offset", [0, 4096])
def test_every_rank_maps_every_memory_zeroed(system, offset):
    system.offset = offset
    got = system.connect()
    memories = [mapped.memory for mapped in got]
    assert all(memory.numel() == 96 and not memory.any() for memory in memories)
    for mapped in got:
        assert mapped.addresses == [memory.data_ptr() for memory in memories]


def one_gpu_each(system):
    """CUDA_VISIBLE_DEVICES gives each process its own: no peer to ask the driver about."""
    system.visible = 1


def a_foreign_gpu(system):
    """A GPU that no rank uses may be as it likes."""
    system.uuids.append("GPU-other")
    system.visible, system.apart = RANKS + 1, {(r, RANKS) for r in range(RANKS)}


@pytest.mark.parametrize("change", [one_gpu_each, a_foreign_gpu])
def test_what_is_no_obstacle(system, change):
    change(system)
    assert all(isinstance(mapped, nvlink.Mapped) for mapped in system.connect())


OBSTACLES = {
    "backend": ({"backend": "gloo"}, "the group's backend is not NCCL. Mend: init_process_group"),
    "gpu": ({"capability": (8, 0)}, "rank 0: its GPU is no Hopper"),
    "torch": ({"module": None}, "rank 0: this torch has no symmetric memory"),
    "hosts": ({"boots": ["a", "a", "b", "b"]}, "rank 2: it is on another host than rank 0. Mend: pass gpus"),
    "shared": (
        {"uuids": ["x", "y", "z", "y"]},
        "rank 3: it has the GPU of another rank. Mend: torch.cuda.set",
    ),
    "peer access": ({"apart": {(1, 3)}}, "rank 1: its GPU cannot map another's memory. Mend: GPUs joined by"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle_is_the_same_answer_on_every_rank_before_anything_is_mapped(system, name):
    changes, expected = OBSTACLES[name]
    for attribute, value in changes.items():
        setattr(system, attribute, value)
    got = system.connect()
    assert len(set(got)) == 1 and got[0].startswith(expected), got
    assert not system.mapped


def test_nodes_and_ranks_that_the_kernels_do_not_know(system):
    assert "on several nodes" in system.connect(topology=Topology(2, 2))[3]
    assert "at most 8 ranks" in system.connect(topology=Topology(1, 16))[3]


def test_a_rank_that_cannot_map_keeps_all_from_it_and_says_why(system):
    system.broken = dict.fromkeys(range(RANKS), "CUDA error 801:\n operation not supported")
    got = system.connect()
    assert all(text.startswith("rank 0: torch's symmetric memory could not be set up. Mend:") for text in got)
    assert all(text.endswith("(RuntimeError: CUDA error 801: operation not supported)") for text in got)


def test_none_waits_in_the_rendezvous_for_a_rank_without_memory(system):
    system.full = {2}
    got = system.connect()
    assert not system.mapped and all(text.startswith("rank 2: torch's symmetric memory") for text in got)
    assert got[2].endswith("(RuntimeError: CUDA error 2: out of memory)") and "CUDA" not in got[1]


def waits_in_the_store(rank, size):
    exchange = types.SimpleNamespace(group=dist.group.WORLD, timeout=2.0)
    store = dist.distributed_c10d._get_default_store()
    before, start = store.timeout, time.monotonic()
    with pytest.raises(RuntimeError), nvlink._patience(exchange):
        store.wait(["what no rank sets"])
    assert 1 <= time.monotonic() - start < 30 and store.timeout == before


def test_a_rendezvous_ends_in_half_the_timeout(tmp_path):
    ranks.run(tmp_path / "ranks", 1, waits_in_the_store)


def test_an_address_that_is_not_of_the_memory_is_refused(system):
    system.offset = 64
    system.rendezvous = lambda memory, group: types.SimpleNamespace(
        buffer_ptrs=group.all_gather_object(memory.data_ptr() - 32), offset=64
    )
    assert all("an address 32 bytes before this rank's memory" in text for text in system.connect())


# ---- The transport over it


class InTheEmulator(System):
    """The memories are those of the virtual GPUs, where the kernels then run."""

    class Memory(torch.Tensor):
        def data_ptr(self):
            return emulator.current().address_of(self.as_subclass(torch.Tensor))

    def empty(self, size, **options):
        return torch.full((size,), 0xAA, dtype=torch.uint8).as_subclass(self.Memory)

    def rendezvous(self, memory, group):
        mine = memory.data_ptr()
        addresses, memories = zip(*group.all_gather_object((mine, memory)), strict=True)
        return types.SimpleNamespace(buffer_ptrs=addresses, offset=0, keeps=memories)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_kernels_run_over_what_was_mapped(monkeypatch, fp8):
    """Chosen as between processes with GPUs."""
    system = InTheEmulator(monkeypatch)
    monkeypatch.setattr(buffer, "_device", lambda group: torch.device("cuda", system.rank()))
    case = Case(Topology(1, RANKS), fp8=fp8, tokens=8, hidden=144)
    shape = Shape(case.num_experts, case.hidden, case.tokens, case.topk, case.topology)
    inputs = draw(case)

    def program(rank, group):
        exchange = Exchange(group)
        exchange.timeout = 1e-3
        transport, reason = buffer._choose(shape, exchange, None, lambda: design_of(shape, "rings", Tuning()))
        assert (transport.name, reason) == ("nvlink", "")
        calls = Calls(shape, transport)
        plain = {"previous_event": None, "async_op": False}
        got = transport.dispatch(
            calls.dispatch(
                inputs.x[rank],
                inputs.topk_idx[rank],
                inputs.topk_weights[rank],
                2,
                expert_order=True,
                max_recv_tokens=None,
                handle=None,
                **plain,
            )
        )
        y, _ = results(case, 0, rank, got.handle.rows)
        call = calls.combine(y, got.handle, got.topk_weights, None, 2, weights_grad=None, **plain)
        return got, transport.combine(call).x, transport.bytes_sent()

    each = emulator.VirtualCluster(1, RANKS, num_sms=2).run(program)
    want = reference.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, case.num_experts)
    y = [results(case, 0, rank, len(part.origin))[0] for rank, part in enumerate(want)]
    weights, counts = [part.topk_weights for part in want], [idx.shape[0] for idx in inputs.topk_idx]
    sums = reference.combine(y, want, counts, case.topology, weights)
    row = 144 + 2 * 4 if fp8 else 2 * 144
    for rank, ((got, home, sent), part) in enumerate(zip(each, want, strict=True)):
        for mine, expected in zip(tensors(got.x), tensors(part.x), strict=True):
            assert torch.equal(bits(mine), bits(expected))
        assert torch.equal(got.topk_idx, part.topk_idx) and torch.equal(bits(home), bits(sums[rank]))
        owners = (inputs.topk_idx[rank] // case.local_experts).tolist()
        away = sum(len({*of_token} - {rank, -1}) for of_token in owners)
        came = len({(source, token) for source, token, _ in part.origin if source != rank})
        assert sent == away * (row + 8 * case.topk) + came * 2 * 144


def tensors(x):
    return (x.data.view(torch.uint8), x.scales) if isinstance(x, QuantizedTensor) else (x,)


def test_one_rank_alone_cannot_have_it():
    with pytest.raises(RuntimeError, match="transport is 'nvlink', but the group's backend is not NCCL."):
        ep.Buffer(None, 4, 32, 8, 2, transport="nvlink")
    assert ep.Buffer(None, 4, 32, 8, 2).status().reason == ""
    with pytest.raises(ValueError, match=r"transport is 'ib', expected one of \(None, 'nvlink', "):
        ep.Buffer(None, 4, 32, 8, 2, transport="ib")
