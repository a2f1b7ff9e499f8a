"""A kernel's files as one text with one thing changed: what its tests must notice."""

import re

from dsv3_kernels.jit.compile import kernel_dir


def source(file: str, old: str | re.Pattern[str] = "", new: str = "") -> str:
    """The kernel `file` and what it includes as one text, the one place of `old` replaced by `new`."""
    text, seen = f'#include "{file}"\n', set[str]()
    while match := re.search(r'^#include "(\w+\.cuh)"\n', text, re.MULTILINE):
        name = match[1]
        body = "" if name in seen else (kernel_dir() / name).read_text().replace("#pragma once\n", "")
        text = text[: match.start()] + body + text[match.end() :]
        seen.add(name)
    if not old:
        return text
    found = len(old.findall(text)) if isinstance(old, re.Pattern) else text.count(old)
    assert found == 1, f"{old!r} occurs {found} times in the kernel: mend this table"
    return old.sub(new, text) if isinstance(old, re.Pattern) else text.replace(old, new)
