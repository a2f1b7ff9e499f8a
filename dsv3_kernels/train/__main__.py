"""python -m dsv3_kernels.train: trains the reference DeepSeek-V3 on text, in FP8 and beside it in BF16."""

import os
import sys

# Before torch loads OpenMP: threads that spin while they wait make a step ten times slower wherever another
# program wants the same cores, and gain little where none does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dsv3_kernels.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
