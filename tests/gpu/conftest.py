"""Tests that need a Hopper GPU; anywhere else they are skipped, and say why."""

import pytest
import torch

from dsv3_kernels import launch


def _missing() -> str | None:
    """Why no kernel can run here; None if it can."""
    if not torch.cuda.is_available():
        return "needs a GPU: found no CUDA device, or torch is a CPU build"
    capability = torch.cuda.get_device_capability()
    if capability != launch.CAPABILITY:
        return (
            f"needs a Hopper GPU (compute capability 9.0), found {torch.cuda.get_device_name()} {capability}"
        )
    return None


def pytest_collection_modifyitems(items):
    reason = _missing()
    if reason is None:
        return
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """A report or a fault that a test leaves on the device belongs to that test, not to the next."""
    yield
    launch.synchronize()
