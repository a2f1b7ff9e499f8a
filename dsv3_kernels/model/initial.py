"""Initial weights: each from a stream of its own, so that a part of a model has the values of the whole."""

import hashlib

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20
"""Values drawn at a time: what the drawing takes beside the tensor itself."""


def fill_normal(tensor: Tensor, std: float, *stream: object) -> None:
    """Fills a contiguous tensor, of any dtype and device, from N(0, std²).

    stream: names what is drawn; the values are a function of it alone. It is hashed into the key of a Philox
    generator, 128 bits: as many as it takes for no two of 40,000 tensors to be alike.
    """
    digest = hashlib.sha256("/".join(map(str, stream)).encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    for part in tensor.view(-1).split(CHUNK):
        part.copy_(torch.from_numpy(generator.standard_normal(part.numel(), np.float32)) * std)
