"""Write the kernels as a Hub repository of type `kernel`, which `kernels.get_kernel` and `get_local_kernel` load.

python tools/export_kernels.py OUT     OUT/build/torch-{cpu,cuda,rocm,xpu}/, README.md and LICENSE; OUT must be empty

Every variant is the package as it stands; only its operators' namespace differs, so that variants, and the installed
package, live side by side in one process. Publish the folder as branch `v1` of a repository of type `kernel`.
"""

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "shared-kernels"
PACKAGE = PROJECT / "src/shared_kernels"
VERSION = 1
"""Version of the kernel repository, `shared_kernels.API`: a branch v1 keeps the signatures it began with."""

BACKENDS: dict[str, dict[str, object]] = {
    "cpu": {"type": "cpu"},
    "cuda": {"type": "cuda", "archs": ["8.0", "8.6", "8.9", "9.0"]},
    "rocm": {"type": "rocm", "archs": ["gfx90a", "gfx942"]},
    "xpu": {"type": "xpu"},
}


def export(out: Path) -> list[Path]:
    """Write all variants below `out` and return their folders.

    Raises:
        FileExistsError: `out` holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"OUT must be an empty or a new folder, {out} holds files; remove them or name another.")
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))}
    variants = [_write_variant(out / "build" / f"torch-{backend}", backend, sources) for backend in BACKENDS]
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(PROJECT / name, out / name)
    return variants


def _write_variant(folder: Path, backend: str, sources: dict[str, bytes]) -> Path:
    namespace = f"_shared_kernels_{backend}_{_content_hash(sources)}"
    files = {**sources, "_ns.py": f'"""Written by the export."""\n\nNAMESPACE = "{namespace}"\n'.encode()}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    metadata = {
        "id": namespace,
        "name": "shared-kernels",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": BACKENDS[backend],
        "digest": {"algorithm": "sha256", "files": {name: _digest(content) for name, content in files.items()}},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def _content_hash(sources: dict[str, bytes]) -> str:
    """Eight hex digits of what the operators do: two exports of one state of the sources are the same module."""
    hashed = hashlib.sha256()
    for name, content in sources.items():
        hashed.update(f"{name}\0{len(content)}\0".encode() + content)
    return hashed.hexdigest()[:8]


def _digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is empty or does not exist")
    try:
        for folder in export(parser.parse_args().out):
            print(f"wrote {folder}")
    except FileExistsError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
