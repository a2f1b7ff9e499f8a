"""What `dsv3_kernels.warmup` compiles ahead for expert parallelism: the kernels within a node."""

from ..jit import Kernel
from . import internode_kernels, low_latency_kernels
from . import kernels as within_node


def kernels() -> dict[str, list[Kernel]]:
    """Op name -> its instances. Those between nodes take NVSHMEM and seconds each: `between_nodes`."""
    return {
        "dispatch": [within_node.DISPATCH, within_node.DISPATCH_AGAIN],
        "combine": [within_node.COMBINE],
        "low_latency": [low_latency_kernels.kernel(1, emulated=False)],
    }


def between_nodes() -> list[Kernel]:
    """For `warmup(between_nodes())`, ahead of a run on several nodes."""
    throughput = [internode_kernels.DISPATCH, internode_kernels.DISPATCH_AGAIN, internode_kernels.COMBINE]
    return [*throughput, low_latency_kernels.kernel(2, emulated=False)]
