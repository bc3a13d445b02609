"""What a Hub stores: files, commits, branches and tags. In memory, no HTTP."""

import hashlib
from dataclasses import dataclass, field
from typing import Any


class HubError(Exception):
    """An answer other than success; `code` becomes the X-Error-Code header that the client turns into an exception."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


@dataclass(frozen=True)
class Blob:
    """One version of one file. Large ones are identified by their sha256, small ones as git does it."""

    data: bytes
    is_large: bool = False

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.is_large else self.git_oid

    def describe(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_oid}
        large = {"lfs": {"oid": self.etag, "size": len(self.data), "pointerSize": 130}}
        return entry | large if self.is_large else entry


@dataclass(frozen=True)
class Commit:
    """All files of one revision, and the ids of its ancestors, newest first."""

    title: str
    files: dict[str, Blob]
    ancestors: tuple[str, ...] = ()

    @property
    def oid(self) -> str:
        names = [f"{path}:{blob.etag}" for path, blob in sorted(self.files.items())]
        return hashlib.sha1("\n".join([self.title, *self.ancestors, *names]).encode()).hexdigest()

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        """The entries below `folder` ("" is the root), folders included."""
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(self.files.items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                above = prefix + "/".join(parts[:depth])
                entries[above] = {"type": "directory", "path": above, "size": 0, "oid": Blob(above.encode()).git_oid}
            entries[path] = blob.describe(path)
        return [entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(prefix)]


@dataclass
class Repository:
    """Commits by id, and the branches and tags that name them. Starts with an empty commit on `main`."""

    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add("main", Commit("initial commit", {}))

    def add(self, branch: str, commit: Commit) -> str:
        oid = commit.oid
        self.commits[oid] = commit
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """The commit id of a branch, tag or commit id."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid
