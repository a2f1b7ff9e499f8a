"""Ranks on several nodes in the emulator; their kernels run round after round, none waits for the others."""

from types import SimpleNamespace

import torch
from cases import bits, draw, results
from test_ep import check_weights_grad

from dsv3_kernels import emulator
from dsv3_kernels.ep import internode_kernels as internode
from dsv3_kernels.ep import kernels, reference
from dsv3_kernels.ep.transport import Shape
from dsv3_kernels.quantized import ROW, QuantizedTensor, empty_mn_major

SECONDS = 2e-3  # of virtual time, a wait's limit


class Cluster:
    """The ranks of a case, their memories and what they keep between calls."""

    def __init__(self, case, seed=0, num_sms=2, chunk=2, depth=2, warps=8, channels=None, **options):
        self.case, self.size, self.num_sms, self.warps = case, case.topology.size, num_sms, warps
        self.seconds = SECONDS
        topology = case.topology
        sms = options.pop("sms", num_sms)  # of a GPU
        self.cluster = emulator.VirtualCluster(
            topology.nodes, topology.gpus_per_node, seed, num_sms=sms, **options
        )
        self.shape = Shape(case.num_experts, case.hidden, case.tokens, case.topk, topology)
        self.channels = channels or num_sms // 2
        self.rings = internode.Rings(self.shape, chunk, depth, channels=self.channels)
        self.links = self.connect()

    def connect(self):
        """The link of every rank."""
        gpus, device = self.case.topology.gpus_per_node, torch.device("cpu")
        size = kernels.Workspace(self.shape).size
        self.memory = self.cluster.symmetric((size,), torch.uint8)
        addresses = [self.cluster.address_of(m, rank) for rank, m in enumerate(self.memory)]
        symmetric = [self.cluster.symmetric((self.rings.size,), torch.uint8) for _ in kernels.OPS]
        links = []
        for rank in range(self.size):
            on_node = addresses[rank // gpus * gpus :][:gpus]
            peers = kernels.empty_state(rank, torch.tensor(on_node * self.case.topology.nodes, device=device))
            pairs = torch.arange(2, 2 + self.rings.channels, dtype=torch.int32)
            own = tuple(of_op[rank] for of_op in symmetric)
            links.append(internode.Link.create(self.rings, peers, own, pairs))
        return links

    def failures(self):
        """Records by rank."""
        every = {
            rank: [kernels.failure_of(link.peers, op) for op in kernels.OPS]
            for rank, link in enumerate(self.links)
        }
        return {rank: found[0] or found[1] for rank, found in every.items() if found[0] or found[1]}

    def faults(self):
        return [rank for rank, link in enumerate(self.links) if link.peers.fault.any()]

    def outputs(self, rows, count):
        """Poisoned."""
        case = self.case
        if case.fp8:
            scales = empty_mn_major((rows, -(-case.hidden // 128)), torch.device("cpu")).fill_(torch.nan)
            data = torch.full((rows, case.hidden), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
            x = QuantizedTensor(data, scales, ROW)
        else:
            x = torch.full((rows, case.hidden), torch.nan).bfloat16()
        shape = (rows,) if case.expert_order else (rows, case.topk)
        came = kernels.Arrivals(
            x,
            torch.full(shape, -9),
            torch.full(shape, torch.nan) if case.weights else None,
            *(
                torch.full(sizes, -9, dtype=torch.int32)
                for sizes in (
                    (case.local_experts + 1,),
                    (count, self.size),
                    (self.size, case.tokens, case.topk),
                    (self.size, self.channels, 2),
                )
            ),
        )
        layout = internode.Layout.of(came, self.shape)
        for name in ("sent_slot", "sent_tokens", "sent_counts", "forward_slot", "forward_ranges"):
            getattr(layout, name).fill_(-9)
        return SimpleNamespace(came=layout, layout=layout)

    def run(self, rounds, both=None, combine=True):
        """Each rank's calls back to back, no rank waiting for another: the outputs by round and rank."""
        self.expected = [expected_of(self.case, inputs) for inputs in rounds]
        if both is None:
            compiled = [kernel.ptx(lineinfo=True) for kernel in (internode.DISPATCH, internode.COMBINE)]
            both = [(ptx.text, ptx.name) for ptx in compiled]
        out = [
            [
                self.outputs(len(self.expected[i][rank].origin), inputs.topk_idx[rank].shape[0])
                for rank in range(self.size)
            ]
            for i, inputs in enumerate(rounds)
        ]

        def program(rank, group):
            for i, inputs in enumerate(rounds):
                mine = out[i][rank]
                operands = kernels.DispatchOperands(
                    inputs.x[rank],
                    inputs.topk_idx[rank],
                    inputs.topk_weights[rank] if self.case.weights else None,
                    mine.came.x,
                    mine.layout,
                    not self.case.expert_order,
                    self.seconds,
                )
                self.dispatch(both, rank, operands)
                if combine and not self.links[rank].peers.failure.any():
                    mine.operands = self.operands(rank, i, inputs, mine)
                    self.combine(both[1:], rank, mine.operands)
                if self.links[rank].peers.failure.any():
                    return

        self.cluster.run(program)
        return out

    def launch(self, kernel, call):
        grid, block, shared = internode.shape_of_launch(self.rings, self.num_sms, self.warps)
        arguments = (kernels.table([call]), self.num_sms)
        emulator.current().launch(*kernel, grid=grid, block=block, shared_bytes=shared, args=arguments)

    def dispatch(self, compiled, rank, operands):
        self.launch(compiled[0], internode.dispatch_call(self.links[rank], operands))

    def combine(self, compiled, rank, operands):
        """A rank's launches."""
        self.launch(*compiled, internode.combine_call(self.links[rank], operands))

    def operands(self, rank, round_, inputs, mine):
        """Of a rank's combine."""
        case, shape = self.case, inputs.topk_idx[rank].shape
        mine.y, mine.gradients = results(case, round_, rank, mine.came.topk_idx.shape[0])
        mine.home = torch.full((shape[0], case.hidden), torch.nan).bfloat16()
        mine.home_gradients = torch.full(shape, torch.nan)
        return kernels.CombineOperands(
            mine.y,
            inputs.topk_idx[rank],
            mine.layout,
            mine.came.topk_weights if case.expert_order else None,
            mine.gradients if case.seed % 2 else None,
            inputs.bias[rank] if round_ == 1 else None,
            mine.home,
            mine.home_gradients if case.seed % 2 else None,
            not case.expert_order,
            self.seconds,
        )


def expected_of(case, inputs):
    weights = inputs.topk_weights if case.weights else None
    return reference.dispatch(
        inputs.x, inputs.topk_idx, weights, case.num_experts, expert_order=case.expert_order
    )


def tensors(x):
    return (x.data.view(torch.uint8), x.scales) if isinstance(x, QuantizedTensor) else (x,)


def check(cluster, round_, out, combine=True):
    case, inputs, want = cluster.case, draw(cluster.case, round_), cluster.expected[round_]
    where = f"round {round_}, {case}"
    for rank, (mine, expected) in enumerate(zip(out, want, strict=True)):
        at = f"rank {rank}, {where}"
        if case.expert_order:
            assert torch.equal(mine.came.group_offsets, expected.group_offsets), at
        assert torch.equal(mine.came.topk_idx, expected.topk_idx), at
        for got, right in zip(tensors(mine.came.x), tensors(expected.x), strict=True):
            assert torch.equal(bits(got), bits(right)), at
        if case.weights:
            assert torch.equal(mine.came.topk_weights, expected.topk_weights), at
    if not combine:
        return
    weights = [part.topk_weights for part in want] if case.weights and case.expert_order else None
    home = reference.combine(
        [mine.y for mine in out],
        want,
        [t.shape[0] for t in inputs.topk_idx],
        case.topology,
        weights,
        inputs.bias if round_ == 1 else None,
    )
    for rank, (mine, right) in enumerate(zip(out, home, strict=True)):
        assert torch.equal(bits(mine.home), bits(right)), f"rank {rank}, {where}"
    if case.seed % 2:
        got = [mine.home_gradients for mine in out]
        check_weights_grad(case, inputs, want, [mine.gradients for mine in out], got)
