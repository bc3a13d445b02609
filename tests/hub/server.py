"""A Hugging Face Hub on a loopback port, for tests that use the real clients.

`LoopbackHub` is the HTTP side; `routes.py` says what each endpoint answers and `repository.py` what is stored.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from .repository import Commit, HubError, Repository
from .routes import ROUTES, TOKEN, Request, Response


class LoopbackHub:
    """An empty Hub with one user and one token, listening after `start()`.

    `requests` lists the (method, path) of everything that was asked; `trusted_publishers` may serve kernels without
    the caller's `trust_remote_code`.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_objects: dict[str, bytes] = {}
        self.trusted_publishers: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: str) -> dict[str, str]:
        """Variables that make a client talk to this Hub and keep its files in `home`. Read when it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",  # else uploads ask for a service that only the real Hub has
            "HF_HUB_USER_AGENT_ORIGIN": "tests",  # without telemetry and this, kernels 0.17 sends a malformed header
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repository(self, request: Request) -> Repository:
        kind, name = request.at.get("kind") or "model", request.at["id"]
        if (kind, name) not in self.repositories:
            raise HubError(404, "RepoNotFound", f"Repository not found: {name}")
        return self.repositories[kind, name]

    def revision(self, request: Request) -> tuple[str, Commit]:
        """Commit id and commit that the request's `rev` names; the head of `main` if it names none."""
        repository = self.repository(request)
        oid = repository.resolve(request.at.get("rev") or "main")
        return oid, repository.commits[oid]

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Response:
        url = urlsplit(target)
        self.requests.append((method, url.path))
        verb = "GET" if method == "HEAD" else method
        for expected, pattern, endpoint in ROUTES:
            match = pattern.fullmatch(url.path) if verb == expected else None
            if match:
                at = {key: unquote(value) for key, value in match.groupdict().items() if value}
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                self._require_token(verb, url.path, headers)
                with self._lock:
                    return endpoint(self, Request(at, query, headers, body))
        raise HubError(404, "NotFound", f"The loopback Hub has no route for {method} {url.path}.")

    def _require_token(self, verb: str, path: str, headers: dict[str, str]) -> None:
        is_open = verb == "GET" or path == "/api/validate-yaml" or path.startswith("/lfs/")  # upload links are secrets
        if not is_open and headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Unauthorized", "Invalid user token.")


def _handler_for(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # headers and body leave in one packet

        def do_GET(self) -> None:
            headers = {name.title(): value for name, value in self.headers.items()}
            try:
                response = hub.answer(self.command, self.path, headers, self._body(headers))
            except HubError as error:
                response = Response(json.dumps({"error": str(error)}).encode(), error.status, error.headers)
            self.send_response(response.status)
            for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.body)

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

        def _body(self, headers: dict[str, str]) -> bytes:
            if headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, *args: object) -> None:
            """Say nothing; `LoopbackHub.requests` is the log."""

    return Handler
