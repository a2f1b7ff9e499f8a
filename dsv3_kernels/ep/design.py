"""Which kernels move tokens between nodes, and what they keep in symmetric memory."""

from .internode_kernels import Rings
from .lean import Slots
from .transport import Shape
from .tuning import Tuning, rings_of

INTERNODE = ("rings", "lean")
Design = Rings | Slots


def check_design(op: str, internode: object, tuning: object) -> Tuning:
    """The tuning, by default the ordinary one. Raises ValueError and TypeError."""
    if internode not in INTERNODE:
        raise ValueError(f"{op}: internode is {internode!r}, expected one of {INTERNODE}")
    tuning = Tuning() if tuning is None else tuning
    if not isinstance(tuning, Tuning):
        raise TypeError(f"{op}: tuning is {type(tuning).__name__}, expected an ep.Tuning or None")
    return tuning


def design_of(shape: Shape, internode: str, tuning: Tuning) -> Design:
    return Slots(shape) if internode == "lean" else rings_of(shape, tuning)
