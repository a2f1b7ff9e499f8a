"""Refuses what reads a tensor's values on the host, so that a CUDA graph can hold the calls that pass."""

from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_kernels import launch


class HostRead(Exception):
    """Something asked for the values of a tensor."""


class NoFunction(TorchFunctionMode):
    """Those that a CPU tensor answers without any operator."""

    NAMES = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu", "__array__")

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if getattr(function, "__name__", "") in self.NAMES:
            raise HostRead(function.__name__)
        return function(*arguments, **(keywords or {}))


class NoOperator(TorchDispatchMode):
    """Those that copy to the host, or whose result has as many elements as the values say."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_to_copy", "equal", "is_nonzero")

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator.overloadpacket.__name__ in self.NAMES:
            raise HostRead(str(operator))
        return operator(*arguments, **(keywords or {}))


@contextmanager
def no_host_reads():
    """HostRead where one happens; not in a launch, which here runs the machine and on a GPU reads nothing."""
    real = launch.launch

    def outside(*arguments, **options):
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, NoOperator(), NoFunction():
        patch.setattr(launch, "launch", outside)
        yield
