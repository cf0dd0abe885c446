"""A stand-in of the hub on loopback, `xdit-download` in a process of its own that asks it, and a local cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """repos: files by repository. cut: after so many bytes the connection dies, once for each entry.
    claimed: sizes to tell instead of the true ones. asked: every request."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.cut: list[int] = []
        self.claimed: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlparse(request.path).path
        self.asked.append((path, request.headers.get("Range")))
        for repo, files in self.repos.items():
            if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
                return self.send(request, json.dumps(self.info(repo, files)).encode(), "application/json")
            if path.startswith(start := f"/{repo}/resolve/{COMMIT}/"):
                return self.send(request, files[path.removeprefix(start)], "application/octet-stream")
        request.send_response(404)
        request.send_header("X-Error-Code", "RepoNotFound")
        request.send_header("Content-Length", "0")
        request.end_headers()

    def info(self, repo: str, files: dict[str, bytes]) -> dict[str, object]:
        siblings = []
        for name, content in files.items():
            size = self.claimed.get(name, len(content))
            blob = hashlib.sha1(content).hexdigest()
            entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": blob}
            if not name.endswith(".json"):
                entry["lfs"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
            siblings.append(entry)
        return {"id": repo, "sha": COMMIT, "siblings": siblings}

    def send(self, request: BaseHTTPRequestHandler, content: bytes, kind: str) -> None:
        asked = request.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        request.send_response(206 if asked else 200)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(content) - start))
        if asked:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        if self.cut and len(content) > (1 << 20):
            request.wfile.write(content[start : start + self.cut.pop(0)])
            request.wfile.flush()
            request.close_connection = True
            return
        request.wfile.write(content[start:])


def download(hub_url: str, *arguments: object, before: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a fresh process; `before`: Python run in it first."""
    code = f"import sys\n{before}\nfrom xdit_download.cli import main\nsys.exit(main())"
    environment = os.environ | {"HF_ENDPOINT": hub_url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True, capture_output=True, timeout=100
    )


def there(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def keep(cache: Path, repo: str, files: Mapping[str, bytes | Path]) -> Path:
    """A copy of a repository in a hub cache, laid out as the hub's client does it: links to blobs. Returns its folder.

    files: contents, or the files that have them, by name. A copy that was there is replaced.
    """
    root = cache / f"models--{repo.replace('/', '--')}"
    shutil.rmtree(root, ignore_errors=True)
    folder = root / "snapshots" / COMMIT
    for part in (root / "refs", root / "blobs", folder):
        part.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for number, (name, content) in enumerate(files.items()):
        blob, link = root / "blobs" / f"{number:040x}", folder / name
        blob.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def copy_of_folder(cache: Path, repo: str, folder: Path) -> Path:
    """The same of a folder's files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return keep(cache, repo, {path.relative_to(folder).as_posix(): path for path in files})
