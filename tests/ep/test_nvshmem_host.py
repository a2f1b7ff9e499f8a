"""The host side of NVSHMEM against a stand-in for its library, in processes; no GPU."""

import ctypes
import os
import re
import shutil
import subprocess
import time
import types
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist

from dsv3_kernels import jit, nvshmem
from dsv3_kernels.ep import Topology, Tuning, buffer, low_latency_kernels
from dsv3_kernels.ep.design import design_of
from dsv3_kernels.ep.transport import Shape
from dsv3_kernels.jit import toolchain

SOURCE = Path(__file__).parents[1] / "fake_nvshmem.cpp"
SHAPE = Shape(8, 32, 4, 2, Topology(1, 2))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("nvshmem") / "libnvshmem_host.so.3"
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", SOURCE, "-o", path], check=True)
    return path


def fake(path, nodes=1, **environment):
    """In a rank's process: the stand-in takes the library's place, its memory is the host's."""
    os.environ |= {name: str(value) for name, value in environment.items()}
    found = toolchain.Nvshmem("3.8.0", path.parent, path, path)
    toolchain.nvshmem = lambda: found
    nvshmem._tensor = lambda pointer, size: torch.frombuffer(
        (ctypes.c_uint8 * size).from_address(pointer), dtype=torch.uint8
    )
    rank = dist.get_rank() if dist.is_initialized() else 0
    nvshmem.os.uname = lambda: types.SimpleNamespace(nodename=f"host{rank * nodes // 2}")
    nvshmem.INFINIBAND = path.parent / "no such folder"
    return ctypes.CDLL(str(path))


def make_port(path, state):
    port = path.parent / f"infiniband {state}" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True, exist_ok=True)
    (port / "state").write_text(f"4: {state}\n")
    return port.parents[2]


def refused(match):
    return pytest.raises(nvshmem.NvshmemError, match=match)


def connect(shape):
    needed = low_latency_kernels.areas(shape)[1].end
    return low_latency_kernels.connect_nvshmem(nvshmem.world(dist.group.WORLD, needed), shape)


def one_node(rank, size, path):
    lib = fake(path)
    connection = connect(SHAPE)
    needed = low_latency_kernels.areas(SHAPE)[1].end
    assert connection.memory.shape == (needed,) and not connection.memory.any()
    assert connection.mapped.tolist() == [
        connection.memory.data_ptr() + 65536 * (peer - rank) for peer in range(2)
    ]
    assert connection.queue_pairs.tolist() == [2, 3, 4, 5] and not connection.kernel.nvshmem
    lib.fake_environment.restype = ctypes.c_char_p
    heard = lib.fake_environment().decode()
    assert "REMOTE_TRANSPORT=none" in heard and "IBGDA=;" in heard and f"SIZE={1 << 30};" in heard
    # One world a process, several buffers in it; a group of others is refused.
    world = nvshmem.current()
    again = connect(SHAPE)
    assert nvshmem.current() is world and lib.fake_worlds() == 1
    assert again.memory.data_ptr() != connection.memory.data_ptr()
    alone = [dist.new_group([r]) for r in range(2)][rank]
    with refused(r"world is that of ranks \[0, 1\], got a group of ranks"):
        nvshmem.world(alone, 1)
    world.initialise(0x1234)
    with refused("nvshmemx_culibrary_init gave status 9"):
        world.initialise(0x5)
    # Too much for the heap, with the size that it takes.
    with refused(rf"{1 << 30} bytes do not fit beside the {2 * needed} .*NVSHMEM_SYMMETRIC_SIZE=\d{{10}} "):
        world.allocate(1 << 30)
    nvshmem.finalize()
    with refused("make an ep.Buffer first"):
        nvshmem.current()
    assert nvshmem.world(dist.group.WORLD, 1).rank == rank


def two_nodes(rank, size, path):
    lib = fake(path, nodes=2, FAKE_NODE=1, FAKE_QUEUE_PAIRS=6)
    group, shape = dist.group.WORLD, Shape(8, 32, 4, 2, Topology(2, 1))
    with refused("found no active port of an RDMA NIC"):
        nvshmem.world(group, 1)
    nvshmem.INFINIBAND = make_port(path, "DOWN")
    with refused("found no active port of an RDMA NIC"):
        nvshmem.world(group, 1)
    nvshmem.INFINIBAND = make_port(path, "ACTIVE")
    connection = connect(shape)
    assert connection.mapped.tolist() == [connection.memory.data_ptr() * (peer == rank) for peer in range(2)]
    assert connection.queue_pairs.tolist() == [2, 3, 4, 5] and connection.kernel.nvshmem
    lib.fake_environment.restype = ctypes.c_char_p
    assert "NVSHMEM_IB_ENABLE_IBGDA=1;NVSHMEM_REMOTE_TRANSPORT=;" in lib.fake_environment().decode()
    with refused(r"made 6 of 7 queue pairs \(status 0\).*NVSHMEM_IBGDA_NUM_RC_PER_PE=7"):
        nvshmem.current().queue_pairs(7)
    os.environ["FAKE_QP_STATUS"] = "3"
    with refused(r"made 0 of 2 queue pairs \(status 3\)"):
        nvshmem.current().queue_pairs(2)


def the_buffers_transport(rank, size, path):
    """What ep.Buffer takes on GPUs of several nodes, and what it says where it cannot."""
    fake(path, nodes=2, FAKE_NODE=1, FAKE_QUEUE_PAIRS=6)
    nvshmem.INFINIBAND = make_port(path, "ACTIVE")
    buffer._device = lambda group: torch.device("cuda")
    exchange = types.SimpleNamespace(group=dist.group.WORLD, rank=rank, size=2, timeout=1.0)
    shape = Shape(8, 32, 4, 2, Topology(2, 1))
    few = r"made 6 of 12 queue pairs .*NVSHMEM_IBGDA_NUM_RC_PER_PE=12"
    transport, reason = buffer._choose(shape, exchange, None, lambda: design_of(shape, "rings", Tuning()))
    assert transport.name == "portable" and re.search(f"no NVSHMEM: .*{few}", reason)
    with pytest.raises(RuntimeError, match=f"transport is 'nvshmem', but .*{few}"):
        buffer._choose(shape, exchange, "nvshmem", lambda: design_of(shape, "rings", Tuning()))
    os.environ |= {"FAKE_QUEUE_PAIRS": "12", "NVSHMEM_SYMMETRIC_SIZE": "1"}
    with pytest.raises(RuntimeError, match=r"heap is too small: \d+ bytes .*NVSHMEM_SYMMETRIC_SIZE=\d{10} "):
        buffer._choose(shape, exchange, "nvshmem", lambda: design_of(shape, "rings", Tuning()))
    os.environ["NVSHMEM_SYMMETRIC_SIZE"] = str(1 << 30)
    transport, reason = buffer._choose(shape, exchange, None, lambda: design_of(shape, "rings", Tuning()))
    assert transport.name == "nvshmem" and not reason
    link, memory = transport.link, transport.peers.table
    assert link.queue_pairs.tolist() == list(range(2, 14))
    assert [part.numel() for part in link.symmetric] == [link.rings.size] * 2
    assert memory[0] == memory[1]  # a rank of another node stands for its forwarder, here itself
    low = buffer._low_latency_of(shape, exchange, "nvshmem")
    assert low._connection.kernel.nvshmem and (low._connection.mapped == 0).tolist() == [rank == 1, rank == 0]
    # Ranks said to share a node, which do not.
    together = Shape(8, 32, 4, 2, Topology(1, 2))
    with pytest.raises(RuntimeError, match=r"memory of ranks \[\d\] is not mapped by rank \d"):
        buffer._choose(together, exchange, "nvshmem", lambda: design_of(together, "rings", Tuning()))
    wide = Shape(8, 32, 4, 2, Topology(2, 1), torch.float32)
    with pytest.raises(RuntimeError, match="dtype is torch.float32"):
        buffer._choose(wide, exchange, "nvshmem", lambda: design_of(wide, "rings", Tuning()))
    buffer._device = lambda group: torch.device("cpu")
    with pytest.raises(RuntimeError, match="backend is not NCCL"):
        buffer._choose(shape, exchange, "nvshmem", lambda: design_of(shape, "rings", Tuning()))


def one_rank_cannot(rank, size, path):
    """It says why, and the other does not wait for it."""
    fake(path, FAKE_VERSION=30700 if rank == 1 else 30800)
    reason = r"device library is 3.8.0 and its host library 3.7.0, expected .* 3.8.0 or newer"
    kind = jit.ToolchainError if rank == 1 else nvshmem.NvshmemError
    with pytest.raises(kind, match=reason if rank == 1 else "rank 1 cannot use NVSHMEM: .*" + reason):
        nvshmem.world(dist.group.WORLD, 1)
    os.environ["FAKE_VERSION"] = "30900"
    assert nvshmem.world(dist.group.WORLD, 1).size == 2


def one_rank_is_left_waiting(rank, size, path):
    """Inside NVSHMEM, for one that failed or that never came: it ends all the same."""
    fake(path, **({"FAKE_INIT": 1} if rank == 1 else {"FAKE_HANG": 60}))
    start = time.monotonic()
    with refused(rf"{'' if rank else 'rank 1 cannot use NVSHMEM: '}NVSHMEM did not start on rank 1 of 2"):
        nvshmem.world(dist.group.WORLD, 1)
    assert time.monotonic() - start < 20
    if rank == 1:
        time.sleep(2)
        return
    with refused(r"did not end in 1 s: of ranks \[1\] each has not answered.*Mend: see whether"):
        nvshmem.world(dist.group.WORLD, 1, timeout=1.0)


def bad_starts(rank, size, path):
    fake(path)
    group = dist.group.WORLD
    for name, value, match in [
        ("FAKE_NO_INTERFACE", "1", "gave status 5 on rank 0.*NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"),
        ("FAKE_INIT", "1", rf"did not start on rank {rank} of 2 \(status 7\)"),
        ("FAKE_SIZE", "4", rf"says that this is rank {rank} of 4, expected {rank} of 2"),
        ("NVSHMEM_SYMMETRIC_SIZE", "much", "NVSHMEM_SYMMETRIC_SIZE is 'much'"),
    ]:
        before = os.environ.get(name)
        os.environ[name] = value
        with refused(match):
            nvshmem.world(group, 1)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

    os.environ["FAKE_VERSION"] = "40000"
    with pytest.raises(jit.ToolchainError, match="expected a host library of major version 3"):
        nvshmem.world(group, 1)

    def nothing():
        raise toolchain.ToolchainError("found no NVSHMEM. Mend: pip install it")

    toolchain.nvshmem = nothing
    with pytest.raises(jit.ToolchainError, match="found no NVSHMEM"):
        nvshmem.world(group, 1)


PROGRAMS = [one_node, two_nodes, the_buffers_transport, one_rank_cannot, one_rank_is_left_waiting, bad_starts]


@pytest.mark.parametrize("program", PROGRAMS)
def test_two_ranks(tmp_path, library, program):
    ranks.run(tmp_path / "ranks", 2, program, library)


def test_sizes_as_nvshmem_reads_them():
    assert [nvshmem._bytes_of(text) for text in ("1073741824", "1G", "1.5GB", "16 m")] == [
        1 << 30,
        1 << 30,
        3 << 29,
        1 << 24,
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and a world would begin")
def test_the_installed_library_meets(tmp_path):
    """The real one, where it is installed: it takes our attributes, and without a GPU says that it failed."""
    try:
        found = toolchain.nvshmem()
    except jit.ToolchainError as error:
        pytest.skip(str(error))
    found.check_versions()
    ranks.run(tmp_path / "ranks", 1, without_gpu)


def without_gpu(rank, size):
    with refused("did not start on rank 0 of 1"):
        nvshmem.world(dist.group.WORLD, 1)
