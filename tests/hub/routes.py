"""The endpoints of the loopback Hub: one function per route, from a Request to a Response."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .repository import Blob, Commit, HubError, Repository

if TYPE_CHECKING:
    from .server import LoopbackHub

USER = "user"
TOKEN = "hf_test"
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".so")  # go through LFS; everything else inside the commit
DATE = "2025-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Request:
    """`at` holds the parts of the path that the route names, `query` the first value of each parameter."""

    at: dict[str, str]
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Response:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200) -> "Response":
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


Endpoint = Callable[["LoopbackHub", Request], Response]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []
PARTS = {
    "kind": r"(?P<kind>model|dataset|space|kernel)s",
    "prefix": r"(?:(?P<kind>dataset|space|kernel)s/)?",
    "id": r"(?P<id>[^/]+/[^/]+)",
    "rev": r"(?P<rev>[^/]+)",
    "name": r"(?P<name>[^/]+)",
    "path": r"(?P<path>.+)",
}


def route(method: str, pattern: str) -> Callable[[Endpoint], Endpoint]:
    """Answer `method` on the paths described by `pattern`, whose `{part}`s are the PARTS."""
    expression = re.compile(re.sub(r"\{(\w+)\}", lambda part: PARTS[part[1]], pattern))

    def add(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, expression, endpoint))
        return endpoint

    return add


@route("GET", "/api/whoami-v2")
def whoami(hub: "LoopbackHub", request: Request) -> Response:
    if request.headers.get("Authorization") != f"Bearer {TOKEN}":
        raise HubError(401, "Unauthorized", "Invalid user token.")
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return Response.json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth})


@route("GET", "/api/organizations/{name}/overview")
def overview(hub: "LoopbackHub", request: Request) -> Response:
    name = request.at["name"]
    return Response.json({"name": name, "fullname": name, "trustedKernelPublisher": name in hub.trusted_publishers})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: "LoopbackHub", request: Request) -> Response:
    return Response.json({"errors": [], "warnings": []})


@route("POST", "/api/repos/create")
def create_repository(hub: "LoopbackHub", request: Request) -> Response:
    values = request.json()
    kind, name = values.get("type") or "model", f"{values.get('organization') or USER}/{values['name']}"
    is_new = (kind, name) not in hub.repositories
    hub.repositories.setdefault((kind, name), Repository())
    url = f"{hub.url}/{'' if kind == 'model' else f'{kind}s/'}{name}"
    return Response.json({"url": url, "name": name, "id": name}, 200 if is_new else 409)


@route("DELETE", "/api/repos/delete")
def delete_repository(hub: "LoopbackHub", request: Request) -> Response:
    values = request.json()
    name = f"{values.get('organization') or USER}/{values['name']}"
    if hub.repositories.pop((values.get("type") or "model", name), None) is None:
        raise HubError(404, "RepoNotFound", f"Repository not found: {name}")
    return Response.json({})


@route("POST", "/api/{kind}/{id}/preupload/{rev}")
def preupload(hub: "LoopbackHub", request: Request) -> Response:
    _, commit = hub.revision(request)
    files = []
    for item in request.json()["files"]:
        path, current = item["path"], commit.files.get(item["path"])
        mode = "lfs" if path.endswith(LARGE_SUFFIXES) else "regular"
        oid = current.git_oid if current else None
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Response.json({"files": files})


@route("POST", r"/{prefix}{id}\.git/info/lfs/objects/batch")
def lfs_batch(hub: "LoopbackHub", request: Request) -> Response:
    hub.repository(request)
    objects = []
    for item in request.json()["objects"]:
        entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in hub.large_objects:
            entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}", "header": {}}}
        objects.append(entry)
    return Response.json({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/{name}")
def lfs_upload(hub: "LoopbackHub", request: Request) -> Response:
    if hashlib.sha256(request.body).hexdigest() != request.at["name"]:
        raise HubError(400, "BadUpload", "The uploaded bytes do not have the announced sha256.")
    hub.large_objects[request.at["name"]] = request.body
    return Response(b"")


@route("POST", "/api/{kind}/{id}/commit/{rev}")
def commit(hub: "LoopbackHub", request: Request) -> Response:
    repository, branch = hub.repository(request), request.at["rev"]
    head, before = hub.revision(request)
    files, title = dict(before.files), ""
    for line in request.body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            title = value["summary"]
            if value.get("parentCommit") not in (None, head):
                raise HubError(412, "Precondition", f"{branch} has moved on to {head}.")
        elif key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[value["path"]] = Blob(hub.large_objects[value["oid"]], is_large=True)
        elif key == "deletedFile":
            del files[value["path"]]
        elif key == "deletedFolder":
            files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        else:
            raise HubError(400, "BadCommit", f"The loopback Hub cannot commit {key!r}.")
    oid = repository.add(branch, Commit(title, files, (head, *before.ancestors)))
    return Response.json({"commitOid": oid, "commitUrl": f"{hub.url}/{request.at['id']}/commit/{oid}", "success": True})


@route("GET", "/api/{kind}/{id}(?:/revision/{rev})?")
def info(hub: "LoopbackHub", request: Request) -> Response:
    oid, commit = hub.revision(request)
    values: dict[str, Any] = dict.fromkeys(("private", "gated", "disabled"), False)
    values |= dict.fromkeys(("downloads", "likes"), 0) | dict.fromkeys(("createdAt", "lastModified"), DATE)
    values |= {"id": request.at["id"], "author": request.at["id"].split("/")[0], "sha": oid, "tags": []}
    values["siblings"] = [{"rfilename": path} for path in sorted(commit.files)]
    return Response.json(values)


@route("GET", "/api/{kind}/{id}/tree/{rev}(?:/{path})?")
def tree(hub: "LoopbackHub", request: Request) -> Response:
    oid, commit = hub.revision(request)
    folder = (request.at.get("path") or "").rstrip("/")
    entries = commit.tree(folder, recursive=request.query.get("recursive", "").lower() in ("true", "1"))
    if folder and not entries:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist.", **{"X-Repo-Commit": oid})
    return Response.json(entries)


@route("POST", "/api/{kind}/{id}/paths-info/{rev}")
def paths_info(hub: "LoopbackHub", request: Request) -> Response:
    _, commit = hub.revision(request)
    wanted = request.json()["paths"]
    return Response.json([entry for entry in commit.tree("", recursive=True) if entry["path"] in wanted])


@route("GET", "/api/{kind}/{id}/refs")
def refs(hub: "LoopbackHub", request: Request) -> Response:
    found = hub.repository(request)
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in found.branches.items()]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in found.tags.items()]
    return Response.json({"branches": branches, "tags": tags, "converts": []})


@route("GET", "/api/{kind}/{id}/commits/{rev}")
def history(hub: "LoopbackHub", request: Request) -> Response:
    oid, newest = hub.revision(request)
    commits = hub.repository(request).commits
    entries = [(each, commits[each].title) for each in (oid, *newest.ancestors)]
    return Response.json([{"id": i, "title": t, "message": "", "date": DATE, "authors": []} for i, t in entries])


@route("POST", "/api/{kind}/{id}/branch/{name}")
def create_branch(hub: "LoopbackHub", request: Request) -> Response:
    found = hub.repository(request)
    return _name_commit(found, found.branches, request.at["name"], request.json().get("startingPoint") or "main")


@route("POST", "/api/{kind}/{id}/tag/{rev}")
def create_tag(hub: "LoopbackHub", request: Request) -> Response:
    found = hub.repository(request)
    return _name_commit(found, found.tags, request.json()["tag"], request.at["rev"])


def _name_commit(repository: Repository, names: dict[str, str], name: str, revision: str) -> Response:
    if name in names:
        raise HubError(409, "Conflict", f"Reference already exists: {name}")
    names[name] = repository.resolve(revision)
    return Response.json({})


@route("GET", "/{prefix}{id}/resolve/{rev}/{path}")
def download(hub: "LoopbackHub", request: Request) -> Response:
    oid, commit = hub.revision(request)
    headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
    blob = commit.files.get(request.at["path"])
    if blob is None:
        raise HubError(404, "EntryNotFound", f"{request.at['path']} does not exist.", **headers)
    headers["ETag"] = f'"{blob.etag}"'
    if blob.is_large:
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Response(blob.data, 200, headers)
    part = blob.data[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None]
    span = f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(blob.data)}"
    return Response(part, 206, headers | {"Content-Range": span})
