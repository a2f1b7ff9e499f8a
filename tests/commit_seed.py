"""Seeds that change with every commit, so that CI covers other cases each time, and repeat within one."""

import functools
import hashlib
import os
import secrets
import subprocess
from pathlib import Path


@functools.cache
def base() -> str:
    """What the seeds are drawn from: DSV3_SEED, or the commit's hash."""
    given = os.environ.get("DSV3_SEED")
    if given:
        return given
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return secrets.token_hex(8)  # no checkout: chance, and the tests print what they drew


def seeds(name: str, count: int) -> list[int]:
    """`count` seeds for the test called `name`, drawn from `base()`."""
    return [
        int.from_bytes(hashlib.sha256(f"{base()} {name} {i}".encode()).digest()[:4], "little")
        for i in range(count)
    ]
