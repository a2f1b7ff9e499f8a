"""Peers' memory over NVLink, with stand-ins for CUDA and torch's symmetric memory; ranks are threads."""

import types

import pytest
import torch

from dsv3_kernels import emulator
from dsv3_kernels.ep import Topology, nvlink
from dsv3_kernels.ep.transport import Shape

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


def test_an_address_that_is_not_of_the_memory_is_refused(system):
    system.offset = 64
    system.rendezvous = lambda memory, group: types.SimpleNamespace(
        buffer_ptrs=group.all_gather_object(memory.data_ptr() - 32), offset=64
    )
    assert all("an address 32 bytes before this rank's memory" in text for text in system.connect())
