"""A Hub on this machine: as much of the server as pushing, listing and downloading model repositories need.

It keeps everything in memory. Clients find it by `HF_ENDPOINT`, need any `HF_TOKEN`, and must not use Xet:

    with HubServer() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(cache)})
        hub.files("owner/name")
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER = "somebody"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class HubError(Exception):
    """A refusal, as the Hub words it: an HTTP status and a code such as "RepoNotFound"."""


class HubServer:
    """The server and its repositories; it runs while the `with` block does."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}  # contents by their SHA-256
        self.commits: dict[str, dict[str, dict[str, str]]] = {}  # repository, commit id, path: SHA-256
        self.branches: dict[str, dict[str, str]] = {}  # repository, branch: commit id
        self.cut_short: set[str] = set()  # ETags of files whose next download breaks off half way
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.hub = self
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self, cache: str | Path) -> dict[str, str]:
        """Variables that make a new process use this server, with its downloads and code under `cache`."""
        settings = {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_dummy", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return {**settings, "HF_HOME": str(cache)}

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of the files of a repository by path."""
        return {path: self.objects[oid] for path, oid in self.at(repo, revision)[1].items()}

    def store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.objects[oid] = content
        return oid

    def commit(self, repo: str, branch: str, files: dict[str, str]) -> str:
        number = len(self.commits.setdefault(repo, {}))
        commit = hashlib.sha1(f"{number}{sorted(files.items())}".encode()).hexdigest()
        self.commits[repo][commit] = files
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, str]]:
        """The commit id that a branch name or commit id stands for, and its files."""
        if repo not in self.commits:
            raise HubError(404, "RepoNotFound")
        commit = self.branches[repo].get(revision, revision)
        if commit not in self.commits[repo]:
            raise HubError(404, "RevisionNotFound")
        return commit, self.commits[repo][commit]


class Handler(BaseHTTPRequestHandler):
    """Answers requests to the server's `hub`."""

    protocol_version = "HTTP/1.1"

    def validate_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    def create(self) -> Any:
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        url = {"url": f"{self.hub_url}/{repo}"}
        if repo in self.hub.commits:
            return 409, url
        self.hub.commit(repo, "main", {})
        return url

    def branch(self, repo: str, branch: str) -> Any:
        if branch in self.hub.branches[repo]:
            return 409, {}
        self.hub.branches[repo][branch] = self.hub.branches[repo]["main"]
        return {}

    def preupload(self, repo: str, revision: str) -> Any:
        self.hub.at(repo, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
        said = [
            {"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in zip(paths, modes, strict=True)
        ]
        return {"files": said}

    def lfs_batch(self, repo: str) -> Any:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub_url}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> Any:
        if self.hub.store(self.body) != oid:
            raise HubError(400, "HashMismatch")
        return {}

    def commit(self, repo: str, revision: str) -> Any:
        files = dict(self.hub.at(repo, revision)[1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = value["oid"]
        commit = self.hub.commit(repo, revision, files)
        return {"commitUrl": f"{self.hub_url}/{repo}/commit/{commit}", "commitOid": commit}

    def info(self, repo: str, revision: str | None) -> Any:
        commit, files = self.hub.at(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings}

    def tree(self, repo: str, revision: str, folder: str | None) -> Any:
        files = self.hub.at(repo, revision)[1]
        inside = [path for path in sorted(files) if folder is None or path.startswith(f"{folder}/")]
        if folder is not None and not inside:
            raise HubError(404, "EntryNotFound")
        size = {path: len(self.hub.objects[files[path]]) for path in inside}
        return [{"type": "file", "path": path, "oid": files[path], "size": size[path]} for path in inside]

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        commit, files = self.hub.at(repo, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound")
        content = self.hub.objects[files[path]]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{files[path]}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, content, headers
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return 206, content[start : end + 1], headers

    def answer(self) -> None:
        self.hub: HubServer = self.server.hub
        self.hub_url = f"http://{self.headers['Host']}"
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for wanted, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, path)
                if wanted == method and match:
                    self.reply(handle(self, **match.groupdict()))
                    return
            raise HubError(404, "NoSuchRoute")
        except HubError as error:
            status, code = error.args
            self.reply((status, {"error": code}, {"X-Error-Code": code}))

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def reply(self, result: Any) -> None:
        """Send json (200), or (status, json or bytes), or these and headers."""
        status, content, headers = (*result, {})[:3] if isinstance(result, tuple) else (200, result, {})
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            cut = headers.get("ETag") in self.hub.cut_short
            self.hub.cut_short.discard(headers.get("ETag", ""))
            self.close_connection |= cut
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, *args: Any) -> None:
        """Requests are not printed."""


ROUTES = [
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", Handler.lfs_upload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    ("GET", f"/api/models/{REPO}(/revision/(?P<revision>.+))?", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler.tree),
    ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
