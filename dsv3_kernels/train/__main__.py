"""python -m dsv3_kernels.train: trains the reference DeepSeek-V3 on text, in FP8 and beside it in BF16."""

import sys

from dsv3_kernels.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
