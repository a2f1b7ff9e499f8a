"""The package itself, for a script that is run by its path.

`python bench/bench_x.py` puts this folder on the module path instead of the one above, so that `import bench`
finds this file: it stands in for the package, with the same modules in it.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parent)]
