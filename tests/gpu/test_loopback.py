"""The all-to-all among virtual ranks of one real GPU: what needs its streams, its graphs and its speed.

Results bit-equal to reference and emulator are in test_cases.py, by the cases of dispatch and combine.
"""

import pytest
import torch

from dsv3_kernels import ep, launch, quantize_1x128
from dsv3_kernels.ep import reference
from dsv3_kernels.quantized import ROW, QuantizedTensor

RANKS, EXPERTS, HIDDEN, TOKENS, TOPK = 4, 32, 1024, 96, 6
ROWS = RANKS * TOKENS * TOPK
SLEEP = 50_000_000  # cycles, about 30 ms
MOST_SMS = {"": 32, "rings": 24, "lean": 32}  # of a rank, by design between two nodes: 128 of the GPU's


@pytest.fixture(params=MOST_SMS, ids=["one node", "2 nodes", "2 nodes, lean"])
def buffer(request):
    nodes = {"gpus_per_node": RANKS // 2, "internode": request.param} if request.param else {}
    return ep.LoopbackBuffer(RANKS, EXPERTS, HIDDEN, TOKENS, TOPK, **nodes, timeout=10.0)


def draw(seed, fp8=False):
    """x, topk_idx, topk_weights, bias of each rank, on the CPU."""
    gen = torch.Generator().manual_seed(seed)
    idx = [torch.rand(TOKENS, EXPERTS, generator=gen).topk(TOPK).indices for _ in range(RANKS)]
    for routing in idx:
        routing[torch.rand(routing.shape, generator=gen) < 0.2] = -1
    x = [torch.randn(TOKENS, HIDDEN, generator=gen).bfloat16() for _ in idx]
    weights = [torch.rand(t.shape, generator=gen) for t in idx]
    bias = [torch.randn(TOKENS, HIDDEN, generator=gen).bfloat16() for _ in idx]
    return [quantize_1x128(t) for t in x] if fp8 else x, idx, weights, bias


def results(seed, rank, rows=ROWS):
    """What the experts return."""
    gen = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(ROWS, HIDDEN, generator=gen).bfloat16()[:rows]


def there(values):
    return [
        QuantizedTensor(t.data.cuda(), _like(t.scales), ROW) if isinstance(t, QuantizedTensor) else t.cuda()
        for t in values
    ]


def _like(scales):
    made = torch.empty_strided(scales.shape, scales.stride(), device="cuda")
    return made.copy_(scales)


def both(buffer, x, idx, weights, bias, y, **options):
    """A dispatch and its combine, nothing read on the host."""
    got = buffer.dispatch(x, idx, weights, max_recv_tokens=ROWS, **options)
    for part in got:
        part.event.wait()
    handles, factors = [part.handle for part in got], [part.topk_weights for part in got]
    out = buffer.combine(y, handles, factors, bias, **options)
    for part in out:
        part.event.wait()
    return got, out


def check(buffer, got, out, x, idx, weights, bias, y):
    want = reference.dispatch(x, idx, weights, EXPERTS)
    counts = [len(part.origin) for part in want]
    for mine, expected, count in zip(got, want, counts, strict=True):
        parts = [(mine.x, expected.x)]
        if isinstance(mine.x, QuantizedTensor):
            parts = [(mine.x.data.view(torch.uint8), expected.x.data.view(torch.uint8))]
            parts += [(mine.x.scales, expected.x.scales)]
        for a, b in parts:
            assert torch.equal(a[:count].cpu(), b)
        assert torch.equal(mine.topk_idx[:count].cpu(), expected.topk_idx)
        assert torch.equal(mine.group_offsets.cpu(), expected.group_offsets)
    cut = [t[:count] for t, count in zip(y, counts, strict=True)]
    factors = [part.topk_weights for part in want]
    sums = reference.combine(cut, want, [TOKENS] * RANKS, buffer.topology, factors, bias)
    for mine, expected in zip(out, sums, strict=True):
        assert torch.equal(mine.x.cpu(), expected)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("num_sms", [2, 8, 20, max(MOST_SMS.values())])
def test_many_rounds_without_a_pause(buffer, fp8, num_sms):
    """Slots are used again while what came before may still be under way."""
    num_sms = min(num_sms, MOST_SMS[buffer.status()[0].internode])
    rounds = [draw(seed, fp8) for seed in range(6)]
    on_gpu = [[there(values) for values in inputs] for inputs in rounds]
    y = [[results(seed, rank) for rank in range(RANKS)] for seed in range(6)]
    y_gpu = [there(values) for values in y]
    found = [both(buffer, *on_gpu[i % 6], y_gpu[i % 6], num_sms=num_sms) for i in range(24)]
    launch.synchronize()
    for i in (*range(6), *range(18, 24)):
        check(buffer, *found[i], *rounds[i % 6], y[i % 6])


def test_nothing_makes_the_host_wait(buffer):
    inputs = [there(values) for values in draw(0)]
    y = there([results(0, rank) for rank in range(RANKS)])
    both(buffer, *inputs, y)  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, _ = both(buffer, *inputs, y, async_op=True, previous_event=ep.Event.here())
        buffer.dispatch(inputs[0], handle=[part.handle for part in got])
        buffer.check()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"async_op": True}])
def test_a_call_comes_behind_what_the_caller_has_queued(buffer, options):
    """Inputs arrive late on a side stream; results are used on it at once."""
    old, new = draw(1), draw(2)
    tensors, sources = [there(values) for values in old], [there(values) for values in new]
    y = [results(2, rank) for rank in range(RANKS)]
    y_gpu = there(y)
    both(buffer, *tensors, y_gpu)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        torch.cuda._sleep(SLEEP)
        for targets, values in zip(tensors, sources, strict=True):
            for target, value in zip(targets, values, strict=True):
                target.copy_(value, non_blocking=True)
        got, out = both(buffer, *tensors, y_gpu, **options)
        copies = [part.x.clone() for part in out]
        for targets in tensors:
            for target in targets:
                target.zero_()
    launch.synchronize()
    assert all(torch.equal(a, b.x) for a, b in zip(copies, out, strict=True))
    check(buffer, got, out, *new, y)


def test_behind_an_event_a_call_does_not_wait_for_the_callers_stream(buffer):
    inputs = [there(values) for values in draw(3)]
    both(buffer, *inputs, there([results(3, rank) for rank in range(RANKS)]))
    torch.cuda.synchronize()
    ready = ep.Event.here()
    torch.cuda._sleep(40 * SLEEP)  # a second and more
    busy = torch.cuda.Event()
    busy.record()
    got = buffer.dispatch(*inputs[:3], max_recv_tokens=ROWS, previous_event=ready, async_op=True, num_sms=4)
    got[0].event._cuda.synchronize()
    assert not busy.query(), "the caller's stream sleeps on"
    torch.cuda.synchronize()


def test_a_graph_replays_with_other_routings(buffer):
    """Epochs live on the device, so that a replay is a call like any other; eager calls may come between."""
    rounds = [draw(seed) for seed in range(4)]
    y = [[results(seed, rank) for rank in range(RANKS)] for seed in range(4)]
    tensors, y_gpu = [there(values) for values in rounds[0]], there(y[0])
    both(buffer, *tensors, y_gpu)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, out = both(buffer, *tensors, y_gpu)
    for seed in (1, 2, 3, 1):
        for targets, values in zip((*tensors, y_gpu), (*rounds[seed], y[seed]), strict=True):
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)
        graph.replay()
        launch.synchronize()
        check(buffer, got, out, *rounds[seed], y[seed])
        eager = both(buffer, *tensors, y_gpu)
        launch.synchronize()
        check(buffer, *eager, *rounds[seed], y[seed])


def test_a_fault_is_raised_where_the_host_waits(buffer):
    good, bad = draw(5), draw(5)
    bad[1][2][7, 3] = EXPERTS
    inputs, y = [there(values) for values in bad], [results(5, rank) for rank in range(RANKS)]
    fault = r"topk_idx\[7, 3\] of rank 2 is 32, out of range"
    for wait in (launch.synchronize, buffer.check):
        both_at_once = buffer.dispatch(*inputs[:3], max_recv_tokens=ROWS, async_op=True)
        buffer_handles = [part.handle for part in both_at_once]
        try:
            buffer.combine(there(y), buffer_handles, async_op=True)  # queued behind it, unless it is known
        except ValueError as error:
            assert "of rank 2 is 32" in str(error)
            continue
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=fault):
            wait()
    with pytest.raises(ValueError, match=fault):
        buffer.dispatch(*inputs[:3], max_recv_tokens=ROWS, async_op=True)[0].event.synchronize()
    got, out = both(buffer, *[there(values) for values in good], there(y))
    launch.synchronize()
    check(buffer, got, out, *good, y)


def test_more_rows_than_declared_leave_what_lies_behind_alone(buffer):
    inputs = [there(values) for values in draw(6)]
    with pytest.raises(ValueError, match="expected at most its max_recv_tokens = 16"):
        buffer.dispatch(*inputs[:3], max_recv_tokens=16)[0].event.synchronize()
    got = buffer.dispatch(*inputs[:3])
    assert [part.topk_idx.shape[0] for part in got] == [int(part.group_offsets[-1]) for part in got]
