"""Speed and memory of the packages beside their peers; see README.md for how to read the table.

Importing this package puts the source folders of the repository on the module path, so that the tree is what gets
measured, also where nothing is installed.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

for folder in sorted([ROOT / "shared-kernels" / "src", *ROOT.glob("packages/*/src")], reverse=True):
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# One thread everywhere, before any library reads these: a ratio of programs must not become a ratio of thread counts.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
