"""What an SM of Hopper offers, as far as the choice of a kernel's configuration asks."""

SHARED_MEMORY = 227 * 1024  # bytes a block may have
WARPGROUP = 128  # threads
WAVE = 64  # rows of a wgmma
L2_BYTES = 40  # a cycle and SM, from L2: 5,120 over 132
