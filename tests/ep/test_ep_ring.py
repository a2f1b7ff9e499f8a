"""csrc/kernels/channel.cuh with 2 ranks, 1 channel and 2 slots: every interleaving, as it is and broken."""

import mutate
import pytest
import torch

from dsv3_kernels import emulator, jit
from dsv3_kernels.ep import kernels

# Rank 0 streams `tokens` a call to rank 1; the roles are those of dispatch.cuh, a lane each.
KERNEL = """
extern "C" __global__ void stream(dsv3::u8* const* mappings, dsv3::Sequence* sequence, dsv3::Failure* failure,
                                  dsv3::Counters* counters, dsv3::u64* out, dsv3::u32 rank, dsv3::u32 epochs,
                                  dsv3::u32 tokens, dsv3::u32 counted) {
    using namespace dsv3;
    const Rank self{mappings, sequence, failure, counters, 64, 16, 1000000, rank, 2, 1, 2, 2, nullptr};
    Rank sources = self;
    sources.ranks = 1;  // rank 0 alone waits for what is acknowledged
    const Workspace mine = self.mine(), theirs = self.workspace(1);
    for (u64 epoch = 1; epoch <= epochs; ++epoch) {
        const u64 begun = epoch << 32;
        if (rank == 0) {
            if (self.wait(mine.ack(1), epoch - 1, Role::kSend, 1, 0) < epoch - 1) return;
            if (counted) {
                theirs.counts(0, 0)[0] = tokens;
                publish(theirs.tail(0, 0), begun);
            }
            for (u32 i = 0; i < tokens; ++i) {
                *reinterpret_cast<u64*>(theirs.slot(0, i)) = 10 * epoch + i;
                publish(theirs.tail(0, 0), begun | (i + 1));
            }
        } else {
            u32 total = tokens;
            if (counted) {
                if (self.wait(mine.tail(0, 0), begun, Role::kReceive, 0, 0) < begun) return;
                total = mine.counts(0, 0)[0];
            }
            for (u32 i = 0; i < total; ++i) {
                const u64 expected = begun | (i + 1);
                if (self.wait(mine.tail(0, 0), expected, Role::kReceive, 0, 0) < expected) return;
                out[(epoch - 1) * tokens + i] = *reinterpret_cast<u64*>(mine.slot(0, i));
            }
            acknowledge(sources, epoch);
        }
    }
}
"""

COUNTED = (1, 2, 1)  # calls, tokens a call, counts announced: both slots
REUSED = (2, 1, 0)  # a slot twice
LONG = [pytest.param(case, marks=pytest.mark.long) for case in ((2, 2, 0), (2, 1, 1))]
WRITE = "*reinterpret_cast<u64*>(theirs.slot(0, i)) = 10 * epoch + i;"
TAIL = "publish(theirs.tail(0, 0), begun | (i + 1));"
ACK = "if (self.wait(mine.ack(1), epoch - 1, Role::kSend, 1, 0) < epoch - 1) return;"
PUBLISH_COUNTS = "publish(theirs.tail(0, 0), begun);"
COUNTS = "theirs.counts(0, 0)[0] = tokens;"
HAZARD, TIMEOUT, WRONG = "hazard", "timeout", "wrong result"

# name: (case, [(what to replace, by what)], what some interleaving must give)
PLANTED = {
    "tail before data": (
        COUNTED,
        [(WRITE, TAIL), (TAIL + "\n            }\n", WRITE + "\n            }\n")],
        {HAZARD, WRONG},
    ),
    "credit lost": (
        REUSED,
        [("ptx::store_release_system(self.workspace(peer).ack(self.rank), epoch);", ";")],
        {TIMEOUT},
    ),
    "slot reused early": (REUSED, [(ACK, "")], {HAZARD, WRONG}),
    "acknowledged before it is read": (
        REUSED,
        [
            ("u32 total = tokens;", "u32 total = tokens; acknowledge(sources, epoch);"),
        ],
        {HAZARD, WRONG},
    ),
    "one token too many counted": (COUNTED, [(COUNTS, "theirs.counts(0, 0)[0] = tokens + 1;")], {TIMEOUT}),
    "one token too few counted": (COUNTED, [(COUNTS, "theirs.counts(0, 0)[0] = tokens - 1;")], {WRONG}),
    "counts after their tail": (
        COUNTED,
        [(COUNTS, ""), (PUBLISH_COUNTS, PUBLISH_COUNTS + COUNTS)],
        {HAZARD, WRONG},
    ),
    "a tail of the call before": (
        REUSED,
        [("const u64 expected = begun", "const u64 expected = 1ull << 32")],
        {HAZARD, WRONG},
    ),
    "no fence before a tail": (
        COUNTED,
        [("st.release.sys.global.u64", "st.relaxed.sys.global.u64")],
        {HAZARD},
    ),
    "no fence after a wait": (
        COUNTED,
        [("ld.acquire.sys.global.u64", "ld.relaxed.sys.global.u64")],
        {HAZARD},
    ),
    "a fence of the GPU only": (
        COUNTED,
        [("st.release.sys.global.u64", "st.release.gpu.global.u64")],
        {HAZARD},
    ),
}


def compiled(changes=()):
    source = mutate.source("channel.cuh") + KERNEL
    for old, new in changes:
        assert old in source, f"{old!r} is not in the kernel: mend this table"
        source = source.replace(old, new)
    return jit.compile_ptx(source, lineinfo=True)


def explore(ptx, case, limit):
    """How many interleavings there were: each without a hazard or a timeout, and with what was sent."""
    epochs, tokens, _ = case

    def run(cluster):
        memory = [torch.zeros(8192, dtype=torch.uint8) for _ in range(2)]
        table = [cluster.address_of(m, rank) for rank, m in enumerate(memory)]
        out = [torch.full((epochs * tokens,), -1) for _ in range(2)]
        peers = [kernels.empty_state(rank, torch.tensor(table)) for rank in range(2)]
        args = [
            [p.table, p.sequence, p.failure, p.counters, out[rank], rank, *case]
            for rank, p in enumerate(peers)
        ]
        cluster.launch(ptx, "stream", grid=(1, 1, 1), block=(1, 1, 1), args=args)
        if any(p.failure.any() for p in peers):
            raise AssertionError(TIMEOUT)
        if out[1].tolist() != [10 * (n + 1) + i for n in range(epochs) for i in range(tokens)]:
            raise AssertionError(WRONG)

    make = emulator.VirtualCluster
    options = {"nodes": 1, "gpus_per_node": 2, "num_sms": 1, "late_stores": False}
    return emulator.explore(run, limit=limit, make=make, **options)


@pytest.mark.parametrize("case", [COUNTED, REUSED, *LONG], ids=str)
def test_every_interleaving_of_the_ring(case):
    assert explore(compiled(), case, limit=2_000_000) > 1000


@pytest.mark.parametrize("name", PLANTED)
def test_some_interleaving_shows_a_broken_ring(name):
    case, changes, expected = PLANTED[name]
    ptx = compiled(changes)
    try:
        explore(ptx, case, limit=20_000)
    except emulator.HazardError:
        seen = HAZARD
    except AssertionError as error:
        seen = str(error)
    else:
        seen = "nothing"
    assert seen in expected
