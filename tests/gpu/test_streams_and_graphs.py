"""Kernels take their place in a stream, in a CUDA graph, and on a fresh thread, like PyTorch's own."""

import threading

import pytest
import torch

from bench import cases

# One case an op: how a launch is ordered does not depend on the shape.
FIRST = list({case.name.split()[0]: case for case in reversed(list(cases.cases()))}.values())
one_case_an_op = pytest.mark.parametrize("case", FIRST, ids=str)
SLEEP = 50_000_000  # cycles, about 30 ms


def inputs_of(case, seed):
    return case.inputs(torch.Generator().manual_seed(seed))


def refill(tensors, inputs):
    for tensor, source in zip(tensors, inputs, strict=True):
        tensor.copy_(source, non_blocking=True)


@one_case_an_op
def test_a_launch_goes_to_the_current_stream(case):
    """Its inputs arrive on that stream, late: a kernel on any other would read what was there before."""
    old, new = inputs_of(case, 1), inputs_of(case, 2)
    tensors = [cases.to_device(tensor, "cuda") for tensor in old]
    sources = [cases.to_device(tensor, "cuda") for tensor in new]
    case.run(*tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        refill(tensors, sources)
        result = case.run(*tensors)
    stream.synchronize()
    assert not cases.differences(result, case.reference(*new))


@one_case_an_op
def test_launches_follow_each_other_closely(case):
    """Many launches and no wait: those that may start early still see what came before them."""
    rounds = [inputs_of(case, seed) for seed in range(4)]
    sources = [[cases.to_device(tensor, "cuda") for tensor in inputs] for inputs in rounds]
    tensors = [cases.to_device(tensor, "cuda") for tensor in rounds[0]]
    results = []
    for i in range(40):
        refill(tensors, sources[i % 4])
        results.append(case.run(*tensors))
    torch.cuda.synchronize()
    expected = [case.reference(*inputs) for inputs in rounds]
    for i, result in enumerate(results):
        assert not cases.differences(result, expected[i % 4]), f"launch {i}"


@one_case_an_op
def test_a_cuda_graph_replays_with_new_inputs(case):
    tensors = [cases.to_device(tensor, "cuda") for tensor in inputs_of(case, 0)]
    case.run(*tensors)  # compiles and loads, which a capture cannot
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = case.run(*tensors)
    for seed in range(1, 6):
        inputs = inputs_of(case, seed)
        refill(tensors, inputs)
        graph.replay()
        torch.cuda.synchronize()
        assert not cases.differences(result, case.reference(*inputs)), f"seed {seed}"


@one_case_an_op
def test_a_fresh_thread_launches(case):
    inputs = inputs_of(case, 0)
    tensors = [cases.to_device(tensor, "cuda") for tensor in inputs]
    torch.cuda.synchronize()
    results = []
    thread = threading.Thread(target=lambda: results.append(case.run(*tensors)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not cases.differences(results[0], case.reference(*inputs))
