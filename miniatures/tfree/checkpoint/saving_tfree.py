"""Saving aside first, so that a failed save leaves the previous one intact."""

import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WEIGHT_FILES = ("model*.safetensors", "model*.safetensors.index.json")


@contextmanager
def staged_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder; on success its files replace those of `target`, on an error nothing of `target` changes.

    Weight files of an earlier save that the new one did not write are removed, as they would be loaded otherwise.

    Args:
        target: the folder to save to; made if it does not exist.
    """
    target = Path(target)
    existed = target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))  # same file system, so that files can be renamed
    try:
        yield staged
        written = sorted(path for path in staged.rglob("*") if path.is_file())
        for path in written:
            final = target / path.relative_to(staged)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, final)
        names = {path.name for path in written}
        if any(_is_weight_file(name) for name in names):
            for path in target.iterdir():
                if path.is_file() and _is_weight_file(path.name) and path.name not in names:
                    path.unlink()
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        if not existed and not any(target.iterdir()):
            target.rmdir()
        raise
    shutil.rmtree(staged, ignore_errors=True)


def _is_weight_file(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHT_FILES)
