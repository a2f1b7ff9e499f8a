"""One emulated node whose ranks launch the all-to-all's kernels, with poisoned outputs; and its check."""

import torch
from cases import bits, draw, results
from test_ep import check_weights_grad

from dsv3_kernels import emulator, jit
from dsv3_kernels.ep import kernels, reference
from dsv3_kernels.ep.transport import Shape
from dsv3_kernels.quantized import ROW, QuantizedTensor, empty_mn_major

SECONDS = 1e-3  # of virtual time, a wait's limit
ONCE = ("dispatch", "combine")  # the calls of a round
SPIN = """
#include "ptx.cuh"
extern "C" __global__ void spin(dsv3::u64 nanoseconds) {
    const dsv3::u64 start = dsv3::ptx::global_timer();
    while (dsv3::ptx::global_timer() - start < nanoseconds) {
    }
}
"""


def other(x):
    """Other rows of the same kind."""
    if isinstance(x, QuantizedTensor):
        data = (x.data.view(torch.uint8) ^ 0x80).view(torch.float8_e4m3fn)
        return QuantizedTensor(data, x.scales * 2, ROW)
    return -x


def tensors(x):
    return (x.data.view(torch.uint8), x.scales) if isinstance(x, QuantizedTensor) else (x,)


def expected_of(case, inputs):
    weights = inputs.topk_weights if case.weights else None
    return reference.dispatch(
        inputs.x, inputs.topk_idx, weights, case.num_experts, expert_order=case.expert_order
    )


def rows_of(case, inputs):
    return [len(e.origin) for e in expected_of(case, inputs)]


class Node:
    """The ranks of one node, their workspaces and what they keep between calls."""

    def __init__(self, case, seed, num_sms, **options):
        self.case, self.size = case, case.topology.size
        self.cluster = emulator.VirtualCluster(1, self.size, seed, num_sms=num_sms, **options)
        self.num_sms, self.back_sms = num_sms, 2 if num_sms == 4 and seed % 2 else num_sms
        self.shape = Shape(case.num_experts, case.hidden, case.tokens, case.topk, case.topology)
        self.workspace = kernels.Workspace(self.shape)
        self.memory = [torch.zeros(self.workspace.size, dtype=torch.uint8) for _ in range(self.size)]
        table = torch.tensor([self.cluster.address_of(m, r) for r, m in enumerate(self.memory)])
        self.peers = [kernels.empty_state(rank, table.clone()) for rank in range(self.size)]

    def failures(self):
        return [p.failure for p in self.peers if p.failure.any()]

    def run(self, rounds, rows, source=None, calls=ONCE, late=None):
        """Each rank's calls back to back, no rank waiting for another: the outputs by round and rank.

        rows: room for what a rank receives, by round and rank. source: one text with all kernels, in place of
        those in csrc. calls: of each round, or a list of them by round. late: (rank, round, number of the
        call, seconds): it comes so much later. A rank whose call failed or was wrong makes no
        other.
        """
        if source is None:
            kinds = kernels.DISPATCH, kernels.DISPATCH_AGAIN, kernels.COMBINE
            self.kernels = [(ptx.text, ptx.name) for ptx in (kind.ptx(lineinfo=True) for kind in kinds)]
        else:
            text = jit.compile_ptx(source, lineinfo=True)
            self.kernels = [(text, name) for name in ("dispatch_tokens", "dispatch_again", "combine_tokens")]
        out = [
            [self.outputs(rows[i][r], inputs.topk_idx[r].shape[0]) for r in range(self.size)]
            for i, inputs in enumerate(rounds)
        ]

        def program(rank, group):
            for i, inputs in enumerate(rounds):
                for number, call in enumerate(calls if isinstance(calls, tuple) else calls[i]):
                    if late and late[:3] == (rank, i, number):
                        self.spin(late[3])
                    self.call(call, rank, i, inputs, out[i][rank])
                    if self.peers[rank].failure.any() or self.peers[rank].fault.any():
                        return

        self.cluster.run(program)
        return out

    def spin(self, seconds):
        text = jit.compile_ptx(SPIN)
        emulator.current().launch(text, "spin", grid=(1, 1, 1), block=(1, 1, 1), args=(int(seconds * 1e9),))

    def call(self, name, rank, round_, inputs, came):
        x = inputs.x[rank]
        if name == "dispatch":
            weights = inputs.topk_weights[rank] if self.case.weights else None
            self.launch(0, self.num_sms, self.dispatch(rank, x, inputs.topk_idx[rank], weights, came.x, came))
        elif name == "again":
            came.again.append(self.empty_rows(tensors(came.x)[0].shape[0]))
            came.kept.append(other(x))  # no launch keeps its arguments alive
            self.launch(
                1, self.back_sms, self.dispatch(rank, came.kept[-1], None, None, came.again[-1], came)
            )
        else:
            self.launch(2, self.back_sms, self.combine(rank, round_, inputs, came))

    def launch(self, kernel, num_sms, call):
        sizes = kernels.shape_of_launch(self.shape, num_sms)
        sizes = dict(zip(("grid", "block", "shared_bytes"), sizes, strict=True))
        emulator.current().launch(*self.kernels[kernel], args=(kernels.table([call]), num_sms), **sizes)

    def dispatch(self, rank, x, topk_idx, weights, out, came):
        operands = kernels.DispatchOperands(
            x, topk_idx, weights, out, came, not self.case.expert_order, SECONDS
        )
        return kernels.dispatch_call(self.workspace, self.peers[rank], operands)

    def combine(self, rank, round_, inputs, came):
        case = self.case
        y, gradients = results(case, round_, rank, came.topk_idx.shape[0])
        home = torch.full((inputs.topk_idx[rank].shape[0], case.hidden), torch.nan).bfloat16()
        home_gradients = torch.full(inputs.topk_idx[rank].shape, torch.nan)
        came.homes.append((home, home_gradients))
        came.kept += [y, gradients]
        operands = kernels.CombineOperands(
            y,
            inputs.topk_idx[rank],
            came,
            came.topk_weights if case.expert_order else None,
            gradients if case.seed % 2 else None,
            inputs.bias[rank] if round_ == 1 else None,
            home,
            home_gradients if case.seed % 2 else None,
            not case.expert_order,
            SECONDS,
        )
        return kernels.combine_call(self.workspace, self.peers[rank], operands)

    def empty_rows(self, rows):
        """Poisoned."""
        case = self.case
        if not case.fp8:
            return torch.full((rows, case.hidden), torch.nan).bfloat16()
        scales = empty_mn_major((rows, -(-case.hidden // 128)), torch.device("cpu")).fill_(torch.nan)
        data = torch.full((rows, case.hidden), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return QuantizedTensor(data, scales, ROW)

    def outputs(self, rows, tokens):
        """Poisoned."""
        case = self.case
        shape = (rows,) if case.expert_order else (rows, case.topk)
        came = kernels.Arrivals(
            self.empty_rows(rows),
            torch.full(shape, -9),
            torch.full(shape, torch.nan) if case.weights else None,
            torch.full((case.local_experts + 1,), -9, dtype=torch.int32),
            torch.full((tokens, self.size), -9, dtype=torch.int32),
            torch.full((self.size, case.tokens, case.topk), -9, dtype=torch.int32),
            torch.full((self.size, kernels.channels_of(self.shape, self.num_sms), 2), -9, dtype=torch.int32),
        )
        came.again, came.homes, came.kept = [], [], []
        return came


def check(case, round_, out):
    """What all ranks got in a round, bit for bit, and nothing else."""
    inputs = draw(case, round_)
    want = expected_of(case, inputs)
    for rank, (mine, e) in enumerate(zip(out, want, strict=True)):
        check_dispatch(case, mine, e, f"rank {rank}, round {round_}, {case}")
        check_rows(case, inputs, out, rank, e)
    check_combine(case, round_, inputs, want, out)


def check_dispatch(case, mine, want, at):
    assert torch.equal(mine.group_offsets.diff(), want.tokens_per_expert) and mine.group_offsets[0] == 0, at
    count = len(want.origin)
    assert torch.equal(mine.topk_idx[:count], want.topk_idx) and (mine.topk_idx[count:] == -9).all(), at
    for x, expected in ((mine.x, want.x), *((x, other(want.x)) for x in mine.again)):
        for got, value in zip(tensors(x), tensors(expected), strict=True):
            assert torch.equal(bits(got[:count]), bits(value)), at
            assert (got[count:].isnan() if got.is_floating_point() else got[count:] == 0x7F).all(), at
    if case.weights:
        assert torch.equal(mine.topk_weights[:count], want.topk_weights), at
        assert mine.topk_weights[count:].isnan().all(), at


def check_rows(case, inputs, out, rank, want):
    """What combine needs: a token's slot here, and the slot's rows by ascending expert."""
    rows_of_token = {}
    for row, (source, token, _) in enumerate(want.origin):
        rows_of_token.setdefault((source, token), []).append(row)
    for source, idx in enumerate(inputs.topk_idx):
        for token in range(idx.shape[0]):
            slot = int(out[source].sent_slot[token, rank])
            rows = rows_of_token.get((source, token), [])
            assert (slot >= 0) == bool(rows)
            if rows:
                assert out[rank].rows[source, slot].tolist() == rows + [-1] * (case.topk - len(rows))


def check_combine(case, round_, inputs, came, out):
    counts = [t.shape[0] for t in inputs.topk_idx]
    both = [results(case, round_, rank, part.topk_idx.shape[0]) for rank, part in enumerate(out)]
    y, gradients = (
        [t[: len(c.origin)] for t, c in zip(ts, came, strict=True)] for ts in zip(*both, strict=True)
    )
    weights = [part.topk_weights for part in came] if case.weights and case.expert_order else None
    want = reference.combine(y, came, counts, case.topology, weights, inputs.bias if round_ == 1 else None)
    for homes in zip(*(mine.homes for mine in out), strict=True):
        for rank, ((home, _), expected) in enumerate(zip(homes, want, strict=True)):
            assert torch.equal(bits(home), bits(expected)), f"rank {rank}, round {round_}, {case}"
        if case.seed % 2:
            check_weights_grad(case, inputs, came, gradients, [gradient for _, gradient in homes])
