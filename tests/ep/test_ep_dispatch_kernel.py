"""csrc/kernels/dispatch.cuh in the emulator: several ranks, bit for bit the reference."""

import random

import pytest
import torch
from cases import ROUTINGS, Case, bits, draw
from fp8_helpers import fresh_generator

from dsv3_kernels import emulator
from dsv3_kernels.ep import Topology, kernels, reference
from dsv3_kernels.ep.transport import Shape
from dsv3_kernels.quantized import ROW, QuantizedTensor, empty_mn_major

SECONDS = 1e-3  # of virtual time, a wait's limit


class Node:
    """The ranks of one node, their workspaces and what they keep between calls."""

    def __init__(self, case, seed, num_sms, **options):
        self.case, self.size = case, case.topology.size
        self.cluster = emulator.VirtualCluster(1, self.size, seed, num_sms=num_sms, **options)
        self.num_sms = num_sms
        self.shape = Shape(case.num_experts, case.hidden, case.tokens, case.topk, case.topology)
        tiles = -(-case.hidden // 128) if case.fp8 else 0
        row_bytes = case.hidden * (1 if case.fp8 else 2)
        self.workspace = kernels.Workspace(self.shape, row_bytes, tiles)
        self.memory = [torch.zeros(self.workspace.size, dtype=torch.uint8) for _ in range(self.size)]
        table = torch.tensor([self.cluster.address_of(m, r) for r, m in enumerate(self.memory)])
        self.peers = [kernels.empty_state(rank, table.clone()) for rank in range(self.size)]
        self.error = [torch.zeros(1, dtype=torch.int32) for _ in range(self.size)]

    def outputs(self, rows, counts):
        """Poisoned."""
        case = self.case
        if case.fp8:
            scales = empty_mn_major((rows, self.workspace.tiles), torch.device("cpu")).fill_(torch.nan)
            data = torch.full((rows, case.hidden), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
            x = QuantizedTensor(data, scales, ROW)
        else:
            x = torch.full((rows, case.hidden), torch.nan).bfloat16()
        return kernels.Arrivals(
            x,
            torch.full((rows,), -9),
            torch.full((rows,), torch.nan) if case.weights else None,
            torch.full((case.local_experts + 1,), -9, dtype=torch.int32),
            torch.full((counts, self.size), -9, dtype=torch.int32),
            torch.full((self.size, case.tokens, case.topk), -9, dtype=torch.int32),
            torch.full((self.size, self.num_sms // 2, 2), -9, dtype=torch.int32),
        )

    def dispatch(self, inputs, rows):
        out = [self.outputs(rows[r], inputs.topk_idx[r].shape[0]) for r in range(self.size)]
        ptx = kernels.DISPATCH.ptx(lineinfo=True)
        args = [
            kernels.dispatch_arguments(
                self.workspace,
                self.peers[r],
                self.error[r],
                inputs.x[r],
                inputs.topk_idx[r],
                inputs.topk_weights[r] if self.case.weights else None,
                out[r],
                SECONDS,
            )
            for r in range(self.size)
        ]
        self.cluster.launch(ptx.text, ptx.name, args=args, **kernels.dispatch_grid(self.shape, self.num_sms))
        return out


def tensors(x):
    return (x.data.view(torch.uint8), x.scales) if isinstance(x, QuantizedTensor) else (x,)


def expected_of(case, inputs):
    return reference.dispatch(
        inputs.x, inputs.topk_idx, inputs.topk_weights if case.weights else None, case.num_experts
    )


def check(case, inputs, out, where):
    for rank, (mine, want) in enumerate(zip(out, expected_of(case, inputs), strict=True)):
        at = f"rank {rank}, {where}"
        assert torch.equal(mine.group_offsets, want.group_offsets), at
        count = len(want.origin)
        assert torch.equal(mine.topk_idx[:count], want.topk_idx) and (mine.topk_idx[count:] == -9).all(), at
        for got, expected in zip(tensors(mine.x), tensors(want.x), strict=True):
            assert torch.equal(bits(got[:count]), bits(expected)), at
        if case.weights:
            assert torch.equal(mine.topk_weights[:count], want.topk_weights), at
        check_rows(case, inputs, out, rank, want)


def check_rows(case, inputs, out, rank, want):
    """What combine needs: from a token to its slot here, and from the slot to its rows by ascending expert."""
    rows_of = {}
    for row, (source, token, _) in enumerate(want.origin):
        rows_of.setdefault((source, token), []).append(row)
    for source, idx in enumerate(inputs.topk_idx):
        for token in range(idx.shape[0]):
            slot = int(out[source].sent_slot[token, rank])
            rows = rows_of.get((source, token), [])
            assert (slot >= 0) == bool(rows)
            if rows:
                assert out[rank].rows[source, slot].tolist() == rows + [-1] * (case.topk - len(rows))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_bit_equal_to_the_reference(size):
    seed = fresh_generator().initial_seed() % (1 << 30)
    chance = random.Random(seed)
    for i, routing in enumerate(chance.sample(ROUTINGS, 3 if size == 8 else 4)):
        case = Case(
            Topology(1, size),
            routing,
            fp8=(i + seed) % 2 == 0,
            local_experts=chance.choice([1, 3]),
            hidden=chance.choice([32, 144]),
            num_topk=chance.choice([1, 3, 4]),
            tokens=6,
            weights=chance.random() < 0.7,
            seed=seed + i,
        )
        node = Node(case, seed + i, num_sms=chance.choice([2, 4]) if size < 8 else 2)
        for round_ in range(3):
            inputs = draw(case, round_)
            rows = [len(e.origin) + chance.choice([0, 2]) for e in expected_of(case, inputs)]
            check(case, inputs, node.dispatch(inputs, rows), f"round {round_}, {case}")
        assert all(not e.any() for e in node.error) and all(not p.failure.any() for p in node.peers)
