"""A stand-in for the hub: its HTTP interface as far as downloads and uploads use it."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories in memory, by id: their files by name."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def repo(self) -> dict[str, bytes] | None:
        parts = unquote(self.path).removeprefix("/api/models").split("?")[0].split("/")
        return self.server.repos.get("/".join(parts[1:3]))

    def do_GET(self):
        path, files = unquote(self.path).split("?")[0], self.repo()
        if path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "auth": {}})
        elif files is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in files]
            name = "/".join(path.split("/")[3:5])
            self.answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})
        elif (name := path.split("/", 5)[-1]) in files:
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            self.answer(files[name], ETag=etag, X_Repo_Commit=COMMIT)
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_PUT(self):
        self.server.objects[self.path.rpartition("/")[2]] = self.body()
        self.answer()

    def do_POST(self):
        body = self.body()
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            self.server.repos.setdefault(name, {})
            self.answer({"url": f"{self.server.url}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            large = {True: "lfs", False: "regular"}
            modes = {f["path"]: large[f["path"].endswith(".safetensors")] for f in files}
            found = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]
            self.answer({"files": found})
        elif self.path.endswith("/objects/batch"):
            asked = json.loads(body)["objects"]
            links = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/put/{o['oid']}"}}}
                for o in asked
            ]
            self.answer({"transfer": "basic", "objects": links})
        elif "/commit/" in self.path:
            files = self.repo()
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/c"})
        else:
            self.answer({"error": f"unknown {self.path}"}, 404)


@contextmanager
def running_hub():
    """A hub on this machine while the block runs."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
