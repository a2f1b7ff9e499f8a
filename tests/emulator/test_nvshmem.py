"""PTX that NVSHMEM's own headers make, on the virtual network; and the same PTX linked with its device library."""

import re
import struct
from pathlib import Path

import pytest
import torch

from dsv3_kernels import _emulator, emulator, jit
from dsv3_kernels.jit import cache, compile, disassemble, kernel, toolchain

try:
    toolchain.nvshmem_headers()
except jit.ToolchainError as error:
    pytest.skip(f"NVSHMEM's headers: {error}", allow_module_level=True)

WORDS, ROUNDS = 64, 3
THREAD, WARP, BLOCK, BLOCKING_THREAD, BLOCKING_WARP, BLOCKING_BLOCK = range(6)
DEFAULT = 1  # NVSHMEMX_QP_DEFAULT
SCHEDULES = ("random", "pct", "round_robin", "exhaustive")


@pytest.fixture(scope="module")
def ptx():
    source = (Path(__file__).parent / "nvshmem_kernels.cu").read_text()
    return jit.compile_ptx(source, nvshmem=True)


@pytest.fixture(params=[20, pytest.param(200, marks=pytest.mark.long)])
def seeds(request):
    return range(request.param)


def sent(rank, round=0, size=4):
    return [(rank + size - 1) % size * 1000 + round * 100 + i for i in range(WORDS)]


class Ranks:
    """A cluster, symmetric tensors by name, and a launch of one kernel on all ranks."""

    def __init__(self, ptx, nodes=2, gpus=2, **options):
        self.ptx = ptx
        self.cluster = emulator.VirtualCluster(nodes, gpus, **options)
        self.size = nodes * gpus

    def symmetric(self, *shape, dtype=torch.int32):
        return self.cluster.symmetric(shape, dtype)

    def own(self, *shape, dtype=torch.int32, value=-7):
        return [torch.full(shape, value, dtype=dtype) for _ in range(self.size)]

    def launch(self, kernel, *args, threads=64):
        """An argument is a list of one value a rank, or one value for all."""
        rows = [[a[r] if isinstance(a, list) else a for a in args] for r in range(self.size)]
        self.cluster.launch(self.ptx, kernel, grid=(1, 1, 1), block=(threads, 1, 1), args=rows)


def ring(ptx, form=WARP, prepare=None, nodes=2, gpus=2, **options):
    ranks = Ranks(ptx, nodes, gpus, **options)
    data, source = ranks.symmetric(ROUNDS, WORDS), ranks.symmetric(ROUNDS, WORDS)
    signals = ranks.symmetric(ROUNDS, dtype=torch.int64)
    out = ranks.own(ROUNDS, WORDS)
    if prepare:
        prepare(ranks.cluster)
    ranks.launch("ring", data, source, signals, out, ROUNDS, form)
    return ranks.cluster, torch.stack(out).tolist()


def apart(ptx, data_qp, signal_qp, between=0, **options):
    ranks = Ranks(ptx, **options)
    data, source = ranks.symmetric(WORDS), ranks.symmetric(WORDS)
    signal, out = ranks.symmetric(1, dtype=torch.int64), ranks.own(WORDS)
    ranks.launch("apart", data, source, signal, out, data_qp, signal_qp, between)
    return torch.stack(out).tolist() == [sent(r) for r in range(4)]


def test_the_layout_is_that_of_the_installed_headers():
    """A new NVSHMEM that moves a field, or counts otherwise, fails here and names it."""
    layout = _emulator.leaves.nvshmem_layout()
    names, terms = [], []
    for struct_name in ("nvshmemi_device_host_state_t", "nvshmemi_team_t"):
        for field in layout[struct_name]:
            names.append((struct_name, field))
            terms.append(
                f"sizeof({struct_name})" if field == "sizeof" else f"offsetof({struct_name}, {field})"
            )
    for number in layout["numbers"]:
        names.append(("numbers", number))
        terms.append(number)
    source = f"""#include <device_host/nvshmem_common.cuh>
        #include <device_host_transport/nvshmem_common_transport.h>
        #include <non_abi/device/threadgroup/nvshmemi_common_device_defines.cuh>
        extern "C" __device__ const unsigned layout[] = {{{", ".join(f"(unsigned)({t})" for t in terms)}}};"""
    text = jit.compile_ptx(source, nvshmem=True)
    data = bytes(
        int(x) for x in re.search(r"layout\[\d+\] = \{([^}]*)\}", text)[1].replace(" ", "").split(",")
    )
    data = data.ljust(4 * len(terms), b"\0")  # PTX leaves trailing zeros out
    theirs = dict(zip(names, struct.unpack(f"<{len(terms)}I", data), strict=True))
    ours = {(s, field): layout[s][field] for s, field in names}
    assert ours == theirs


def test_a_table_of_another_size_is_refused(ptx):
    other = ptx.replace("nvshmemi_device_state_d[848]", "nvshmemi_device_state_d[856]")
    assert other != ptx
    with pytest.raises(
        emulator.UnsupportedInstructionError, match="nvshmemi_device_state_d has 856 bytes, expected 848"
    ):
        ring(other)


def test_a_function_that_is_not_bound_is_refused_by_name(ptx):
    for old, new in [
        ("23nvshmemi_transfer_rma_p", "23nvshmemi_transfer_rma_q"),
        ("nvshmemi_transfer_quietIL13threadgroup_t1E", "nvshmemi_transfer_quietIL13threadgroup_t2E"),
        ("nvshmemi_transfer_rma_gIi", "nvshmemi_transfer_rma_gIe"),
        ("nvshmemi_op_t4E", "nvshmemi_op_t5E"),
    ]:
        with pytest.raises(
            emulator.UnsupportedInstructionError, match=rf"calls '\w*{new}\w*', .*bound to no handler"
        ):
            ring(ptx.replace(old, new))


@pytest.mark.parametrize("form", range(6))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_ring_exchange(ptx, form, schedule):
    for seed in range(3 if schedule == "random" else 1):
        _, out = ring(ptx, form, seed=seed, schedule=schedule)
        assert out == [[sent(r, i) for i in range(ROUNDS)] for r in range(4)], f"seed {seed}"


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 4), (4, 1), (1, 1)])
def test_a_ring_over_nvlink_or_infiniband_alone(ptx, nodes, gpus):
    size = nodes * gpus
    for form in (WARP, BLOCKING_BLOCK):
        cluster, out = ring(ptx, form, nodes=nodes, gpus=gpus, seed=form)
        assert out == [[sent(r, i, size) for i in range(ROUNDS)] for r in range(size)]
        # Within a node the headers store to the peer themselves.
        links = cluster.counters["links"]
        assert set(links) == ({(r, (r + 1) % size) for r in range(size)} if nodes > 1 else set())


@pytest.mark.parametrize("checks", [True, False])
def test_a_signal_stays_behind_its_data_on_one_queue_pair(ptx, seeds, checks):
    for seed in seeds:
        assert apart(ptx, 2, 2, seed=seed, checks=checks), f"seed {seed}"


@pytest.mark.parametrize(("data_qp", "signal_qp"), [(2, 3), (DEFAULT, 2), (DEFAULT, DEFAULT)])
def test_a_signal_overtakes_data_of_another_queue_pair(ptx, data_qp, signal_qp):
    outcomes = [apart(ptx, data_qp, signal_qp, seed=seed, checks=False) for seed in range(20)]
    assert not all(outcomes)
    hazards = 0
    for seed in range(20):
        try:
            apart(ptx, data_qp, signal_qp, seed=seed)
        except emulator.HazardError as error:
            hazards += 1
            assert "data race" in str(error) and "symmetric int32" in str(error)
    # The default queue pair is one of several, drawn for each message: it may happen to be the same.
    assert hazards == 20 if DEFAULT not in (data_qp, signal_qp) else hazards > 0


@pytest.mark.parametrize("between", [1, 2, 3, 4])
@pytest.mark.parametrize(("data_qp", "signal_qp"), [(2, 3), (DEFAULT, DEFAULT)])
def test_fence_and_quiet_order_queue_pairs(ptx, between, data_qp, signal_qp):
    for seed in range(5):
        assert apart(ptx, data_qp, signal_qp, between, seed=seed), f"seed {seed}"


def test_a_fence_of_another_queue_pair_orders_nothing(ptx):
    for seed in range(5):
        with pytest.raises(emulator.HazardError, match="data race"):
            apart(ptx, 2, 3, 5, seed=seed)


def blocking_put(ptx, form, reads=0, **options):
    ranks = Ranks(ptx, 4, 1, **options)
    data, source, signal = (
        ranks.symmetric(WORDS),
        ranks.symmetric(WORDS),
        ranks.symmetric(1, dtype=torch.int64),
    )
    ranks.launch("blocking_put", data, source, signal, form, reads)
    return torch.stack(data).tolist()


@pytest.mark.parametrize("form", [BLOCKING_THREAD, BLOCKING_WARP, BLOCKING_BLOCK])
def test_a_blocking_put_frees_its_source_and_promises_no_more(ptx, form):
    for seed in range(3):
        assert blocking_put(ptx, form, seed=seed) == [sent(r) for r in range(4)]
        with pytest.raises(emulator.HazardError, match="data race"):
            blocking_put(ptx, form, reads=1, seed=seed)


def test_a_put_that_does_not_block_leaves_its_source_in_use(ptx):
    for seed in range(3):
        with pytest.raises(emulator.HazardError, match=r"data race: .*'symmetric int32"):
            blocking_put(ptx, THREAD, seed=seed)


def get_back(ptx, form, waits=1, prepare=None, **options):
    ranks = Ranks(ptx, **options)
    data, source = ranks.symmetric(2 * WORDS), ranks.symmetric(WORDS)
    out = ranks.own(WORDS)
    if prepare:
        prepare(ranks.cluster)
    ranks.launch("get_back", data, source, out, form, waits)
    return ranks.cluster, torch.stack(out).tolist()


@pytest.mark.parametrize("form", range(6))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_get_gives_what_was_put_before_quiet(ptx, form, schedule):
    waits = form in (THREAD, WARP, BLOCK)
    for seed in range(3 if schedule == "random" else 1):
        _, out = get_back(ptx, form, waits, seed=seed, schedule=schedule)
        assert out == [[r * 1000 + 701 + i for i in range(WORDS)] for r in range(4)], f"seed {seed}"


@pytest.mark.parametrize("form", [THREAD, WARP, BLOCK])
def test_a_get_is_not_there_before_quiet(ptx, form):
    for seed in range(3):
        with pytest.raises(emulator.HazardError, match="data race"):
            get_back(ptx, form, waits=0, seed=seed, nodes=4, gpus=1)


def test_a_fence_orders_no_get(ptx):
    for seed in range(3):
        with pytest.raises(emulator.HazardError, match="data race"):
            get_back(ptx, THREAD, waits=3, seed=seed)


def test_single_values_of_every_type(ptx):
    for seed in range(3):
        ranks = Ranks(ptx, seed=seed)
        data, out = ranks.symmetric(128, dtype=torch.int8), ranks.own(9, dtype=torch.float64)
        ranks.launch("values", data, out, threads=1)
        for r in range(4):
            assert out[r].tolist() == [
                -5 - r,
                -500 - r,
                -70000 - r,
                -5e9 - r,
                0.5 + r,
                -0.25 - r,
                250 + r,
                4e9 + r,
                11 + r,
            ]


@pytest.mark.parametrize(("nodes", "gpus"), [(2, 4), (1, 8)])
def test_atomics_of_eight_ranks(ptx, nodes, gpus):
    lanes, size = 32, 8
    for seed in range(2):
        ranks = Ranks(ptx, nodes, gpus, seed=seed)
        count, big = ranks.symmetric(16), ranks.symmetric(4, dtype=torch.int64)
        real = ranks.symmetric(1, dtype=torch.float32)
        old, old_big = ranks.own(69), ranks.own(36, dtype=torch.int64)
        count[0][6] = -1
        ranks.launch("atomics", count, big, real, old, old_big, threads=lanes)
        total = lanes * size
        lane_sum = size * sum(range(lanes))
        for first in (0, 32):  # every value was given out once
            assert sorted(x for o in old for x in o[first : first + 32].tolist()) == list(range(total))
        assert sorted(x for o in old_big for x in o[:32].tolist()) == [i << 32 for i in range(total)]
        winner = count[0][7].item()
        assert count[0][:7].tolist() == [total, total, lane_sum, total, -1, 0, -1 - (2**size - 1)]
        assert 1 <= winner <= size
        for r in range(size):
            assert old[r][64].item() == (0 if r == winner - 1 else winner)
        assert big[0][:2].tolist() == [total << 32, lane_sum] and real[0].item() == total / 2
        for r in range(size):
            assert old[r][65:].tolist() == [-7 - r, -7 - r, 100 + r, 200 + r]
            left = (r + size - 1) % size
            assert count[r][8].item() == 200 + left
            assert old_big[r][32:].tolist() == [0, -1 - r, 255 - r, (255 - r) | 0x100]
            assert big[r][2].item() == ((255 - left) | 0x100) ^ 0x101


@pytest.mark.parametrize(("nodes", "gpus"), [(4, 1), (2, 2), (1, 4)])
def test_a_lock(ptx, nodes, gpus):
    for seed in range(3):
        ranks = Ranks(ptx, nodes, gpus, seed=seed)
        lock, total, mine = ranks.symmetric(1), ranks.symmetric(2), ranks.symmetric(2)
        ranks.launch("locked", lock, total, mine, ROUNDS, 1, threads=1)
        assert total[0].tolist() == [4 * ROUNDS, ROUNDS * (0 + 1 + 2 + 3)], f"seed {seed}"
        # The fence behind the atomic is what makes the last holder's work known.
        with pytest.raises(emulator.HazardError, match="data race"):
            ranks.launch("locked", lock, total, mine, ROUNDS, 0, threads=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("nodes", "gpus"), [(2, 2), (1, 4), (3, 1)])
def test_barriers(ptx, schedule, nodes, gpus):
    size = nodes * gpus
    for form in range(6):
        ranks = Ranks(ptx, nodes, gpus, seed=form, schedule=schedule)
        data, out = ranks.symmetric(size), ranks.own(ROUNDS, size)
        for launch in range(2):  # the barriers' count goes on from launch to launch
            ranks.launch("barriers", data, out, ROUNDS, form)
            expected = [[100 * i + r + 1 for r in range(size)] for i in range(ROUNDS)]
            assert [o.tolist() for o in out] == [expected] * size, f"form {form}, launch {launch}"


def test_without_the_barrier_it_is_a_hazard(ptx):
    for nodes, gpus in [(2, 2), (1, 4), (4, 1)]:
        ranks = Ranks(ptx, nodes, gpus)
        with pytest.raises(emulator.HazardError, match="data race"):
            ranks.launch("barriers", ranks.symmetric(4), ranks.own(ROUNDS, 4), ROUNDS, 6)
        # A failure leaves a cluster that can be used again, its barriers as after init.
        data, out = ranks.symmetric(4), ranks.own(ROUNDS, 4)
        ranks.launch("barriers", data, out, ROUNDS, BLOCK)
        assert out[3][2].tolist() == [201, 202, 203, 204]


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_waits(ptx, nodes):
    for seed in range(3):
        ranks = Ranks(ptx, nodes, 4 // nodes, seed=seed)
        flags, signals = ranks.symmetric(4), ranks.symmetric(4, dtype=torch.int64)
        out = ranks.own(8)
        ranks.launch("waits", flags, signals, out, threads=1)
        assert [o.tolist() for o in out] == [[0, 1, 0, 1, 2, 3, 4, 1]] * 4


def test_peers_of_a_node_are_mapped(ptx):
    ranks = Ranks(ptx)
    data, out = ranks.symmetric(4), ranks.own(6)
    ranks.launch("peers", data, out, threads=1)
    assert torch.stack(out).tolist() == [[1, 1, 0, 0, 0, r] for r in (0, 1)] + [
        [0, 0, 1, 1, 0, r] for r in (0, 1)
    ]
    assert torch.stack(data).tolist() == [[1, 2, 0, 0]] * 2 + [[0, 0, 3, 4]] * 2


def test_links_are_counted_exactly(ptx):
    cluster, _ = ring(ptx, WARP, seed=5)
    size = 4 * WORDS
    ib = {"kind": "IB", "messages": 2 * ROUNDS, "bytes": (size + 8) * ROUNDS, "lost": 0}
    # To the peer on its node a rank stores data and signal itself.
    assert cluster.counters["links"] == {(1, 2): ib, (3, 0): ib}
    cluster, _ = get_back(ptx, BLOCKING_WARP, seed=5)
    # There: the put, and the get's request without payload. Back: what was asked for.
    there = {"kind": "IB", "messages": 2, "bytes": size, "lost": 0}
    back = {"kind": "IB", "messages": 1, "bytes": size, "lost": 0}
    assert cluster.counters["links"] == {(1, 2): there, (2, 1): back, (3, 0): there, (0, 3): back}


def test_the_same_seed_is_the_same_run(ptx):
    def run(seed):
        return ring(ptx, BLOCK, seed=seed)[0].counters

    assert run(11) == run(11)
    assert len({run(seed)["nanoseconds"] for seed in range(5)}) > 1


def test_lost_messages_end_in_a_deadlock_that_names_the_link(ptx):
    with pytest.raises(emulator.DeadlockError) as error:
        ring(ptx, WARP, prepare=lambda c: c.drop(1, 2, 0))
    text = str(error.value)
    assert f"{2 * ROUNDS} message(s) from rank 1 to rank 2 were lost" in text
    assert "rank 2 ring block (0,0,0) warp 0" in text and "'symmetric int64[3] of rank 2'" in text

    # The answer of a get: the asking rank waits.
    with pytest.raises(emulator.DeadlockError) as error:
        get_back(ptx, BLOCKING_WARP, prepare=lambda c: c.drop(2, 1, 0))
    text = str(error.value)
    assert "rank 1 get_back block (0,0,0) warp 0" in text
    assert "a get of 256 bytes from rank 2, lost on the link from rank 2 to rank 1" in text
    assert "1 message(s) from rank 2 to rank 1 were lost" in text


@pytest.mark.parametrize("link", [(1, 2), (2, 1)])
def test_a_stalled_link(ptx, link):
    with pytest.raises(
        emulator.DeadlockError, match=r"stand still on the link from rank 1 to rank 2"
    ) as error:
        get_back(ptx, BLOCKING_THREAD, prepare=lambda c: c.stall(*link))
    assert "rank 1 get_back block" in str(error.value)
    cluster, out = get_back(ptx, BLOCKING_THREAD, prepare=lambda c: c.stall(*link, until=5_000_000))
    assert cluster.counters["nanoseconds"] > 5_000_000
    assert out == [[r * 1000 + 701 + i for i in range(WORDS)] for r in range(4)]


def test_what_is_fenced_behind_a_stalled_answer_waits_for_it(ptx):
    for seed in range(5):
        with pytest.raises(emulator.DeadlockError, match=r"quiet: .*message\(s\) to rank 2"):
            get_back(ptx, THREAD, waits=2, prepare=lambda c: c.stall(2, 1), seed=seed)
    cluster, out = get_back(ptx, THREAD, waits=2, prepare=lambda c: c.stall(2, 1, until=5_000_000))
    assert cluster.counters["nanoseconds"] > 5_000_000
    assert out[1] == [1701 + i for i in range(WORDS)]


@pytest.mark.parametrize("step", [0, 300])
def test_a_rank_that_dies(ptx, step):
    with pytest.raises(emulator.DeadlockError) as error:
        ring(ptx, BLOCK, prepare=lambda c: c.kill(1, step))
    text = str(error.value)
    assert "rank 1 died" in text and "rank 2 ring block" in text and "rank 1 ring block" not in text
    ranks = Ranks(ptx, 4, 1)
    ranks.cluster.kill(3, step)
    with pytest.raises(emulator.DeadlockError, match="rank 3 died"):
        ranks.launch("barriers", ranks.symmetric(4), ranks.own(ROUNDS, 4), ROUNDS, WARP)


def test_bad_addresses_ranks_and_queue_pairs(ptx):
    ranks = Ranks(ptx, 4, 1)
    data, source, own = ranks.symmetric(WORDS), ranks.symmetric(WORDS), ranks.own(WORDS)
    signal = ranks.symmetric(1, dtype=torch.int64)
    for to, data_qp, signal_qp, match in [
        (own, 2, 2, "not symmetric memory of the calling rank"),
        (data, 0, 2, "queue pair 0: expected NVSHMEMX_QP_DEFAULT"),
        (data, 2, -1, "queue pair -1: expected"),
    ]:
        with pytest.raises(emulator.MemoryAccessError, match=match):
            ranks.launch("apart", to, source, signal, own, data_qp, signal_qp, 0)


SEND = """#include <nvshmem.h>
#include <nvshmemx.h>
namespace dsv3 {
template <int kBytes>
__global__ void send(char* to, const char* from, uint64_t* signal, int rank, int queue_pair) {
    nvshmemx_qp_char_put_signal_nbi_warp(to, from, kBytes, signal, 1, NVSHMEM_SIGNAL_ADD, rank, queue_pair);
}
}  // namespace dsv3
"""
NAME = "_Z37nvshmemi_transfer_put_signal_dispatchIL13threadgroup_t1EEvPvS1_mS1_{}14nvshmemi_amo_tibi"


def test_a_kernel_links_with_the_device_library(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "send.cuh").write_text(SEND)
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    for module in (compile, kernel):
        monkeypatch.setattr(module, "kernel_dir", lambda: tmp_path / "kernels")
    send = jit.Kernel("send.cuh", "send", (128,), nvshmem=True)
    cubin = send.cubin()
    assert cubin.parameters == ("u64", "u64", "u64", "u32", "u32") and cubin.resources.registers
    # The table that nvshmemx_cumodule_init fills, and the version that it compares.
    assert b"nvshmemi_device_state_d" in cubin.image and b"nvshmemi_device_lib_version_d" in cubin.image
    sass = disassemble.disassemble(cubin.image)
    assert f".text.{cubin.name}:" in sass.text and sass.count("CALL") > 0
    assert f".text.{NAME.format('m')}:" in sass.text and NAME.format("y") not in sass.text

    # Another device library is another cubin; the one at hand comes from the cache.
    def compiled(*arguments):
        raise AssertionError("compiled again")

    monkeypatch.setattr(kernel, "compile_source", compiled)
    kernel._cubin.cache_clear()
    assert send.cubin() == cubin
    monkeypatch.setattr(toolchain.Nvshmem, "build", "another")
    kernel._cubin.cache_clear()
    with pytest.raises(AssertionError, match="compiled again"):
        send.cubin()


def test_what_the_device_library_lacks_is_named(ptx):
    assert NAME.format("y") in ptx
    with pytest.raises(
        jit.CompileError, match=r"(?s)ring.cu with .*libnvshmem_device.a.*nvshmemi_transfer_rma_q"
    ):
        jit.link_nvshmem(ptx.replace("23nvshmemi_transfer_rma_p", "23nvshmemi_transfer_rma_q"), "ring.cu")


def test_linking_is_not_for_kernels_that_trade_registers():
    """Why `jit.link` is for NVSHMEM only; when this fails, nvJitLink has learnt it."""
    source = """extern "C" __global__ void __launch_bounds__(384, 1) trade(float* out) {
        if (threadIdx.x < 128) { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); return; }
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        out[threadIdx.x] += 1; }"""
    whole = compile.compile_source(source, (), compile.source_options(), cubin=True)
    assert disassemble.disassemble(whole.cubin).count("USETMAXREG") == 2
    image, log = jit.link_nvshmem(jit.compile_ptx(source), "trade.cu")
    assert "C7504" in log and disassemble.disassemble(image).count("USETMAXREG") == 0
