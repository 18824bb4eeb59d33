"""The web that downloads need, on 127.0.0.1: pages that may break off, any https host behind a proxy, a model hub."""

from __future__ import annotations

import base64
import json
import re
import ssl
import subprocess
import threading
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
COMMIT = "1" * 40


@dataclass
class Page:
    """What an address answers with; of the announced content only the first bytes, if `sent` says so."""

    content: bytes
    sent: int | None = None
    hold: threading.Event | None = None  # wait for it before breaking off


@dataclass
class Repository:
    """A repository of the hub; one commit is enough."""

    files: dict[str, bytes] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)


class Web(ThreadingHTTPServer):
    """Serves ``pages`` by path, those of a host behind the proxy by host and path, and the repositories of ``hub``."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Visit)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.pages: dict[str, Page] = {}
        self.hub: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.posts: list[str] = []
        self.certificate = folder / "certificate.pem"
        self.hosts = ("github.com", "raw.githubusercontent.com", "api.ngc.nvidia.com", "authn.nvidia.com")
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=loopback"]
        names = ",".join(f"DNS:{host}" for host in self.hosts)
        files = ["-keyout", str(folder / "key.pem"), "-out", str(self.certificate)]
        subprocess.run([*command, "-addext", f"subjectAltName={names}", *files], check=True, capture_output=True)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(self.certificate, folder / "key.pem")
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables by which a process finds all https hosts and the hub here."""
        environment = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HF_ENDPOINT"), self.address)
        environment |= dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), str(self.certificate))
        no_proxy = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        return (
            environment | no_proxy | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        )


class Visit(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Web
    host = ""

    def log_message(self, *_: Any) -> None:
        pass

    def do_CONNECT(self) -> None:
        """Be the proxy, and the host behind it."""
        self.host = self.path.removesuffix(":443")
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.close_connection = False

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        page = self.server.pages.get(self.host + path)
        if page is None:
            return self.visit_hub(path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(page.content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.content[: page.sent])
            self.wfile.flush()
        if page.sent is not None:
            if page.hold is not None:
                page.hold.wait(60)
            self.close_connection = True

    do_HEAD = do_GET

    def visit_hub(self, path: str) -> None:
        """Answer what the hub's client asks to read: versions, lists of files, files."""
        found = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+)/(refs|revision|tree|resolve)(?:/([^/]+))?(?:/(.*))?", path
        )
        repository = self.server.hub.get(found[1]) if found and not self.host else None
        if repository is None:
            return self.answer({}, 404, {"X-Error-Code": "RepoNotFound"})
        kind, revision, file = found[2], found[3], found[4]
        if revision not in (None, "main", COMMIT, *repository.tags):
            return self.answer({}, 404, {"X-Error-Code": "RevisionNotFound"})
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": COMMIT} for tag in repository.tags]
        items = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in repository.files.items()]
        if kind == "resolve":
            content = repository.files[file]
            return self.answer(content, 200, {"ETag": f'"{sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        answers = {"refs": {"branches": [], "converts": [], "tags": tags}, "tree": items}
        return self.answer(answers.get(kind, {"id": found[1], "sha": COMMIT}))

    def do_POST(self) -> None:
        """Take what the hub's client sends: a repository, which files it has, large ones, a commit, a tag."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append(self.path)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer({"error": "who are you?"}, 401)
        *_, owner, name, verb, _ = ["", "", "", *self.path.split("/")]
        if self.path == "/api/repos/create":
            ask = json.loads(body)
            owner = f"{ask['organization']}/{ask['name']}"
            self.server.hub.setdefault(owner, Repository())
            return self.answer({"url": f"{self.server.address}/{owner}"})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            places = [{"upload": {"href": f"{self.server.address}/blobs/{one['oid']}"}} for one in objects]
            return self.answer({"objects": [{**one, "actions": place} for one, place in zip(objects, places)]})
        if verb == "preupload":
            modes = [(f["path"], "lfs" if f["path"].endswith(".pt") else "regular") for f in json.loads(body)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        if verb == "commit":
            for item in map(json.loads, body.splitlines()):
                value = item["value"]
                if item["key"] == "file":
                    self.server.hub[f"{owner}/{name}"].files[value["path"]] = base64.b64decode(value["content"])
                if item["key"] == "lfsFile":
                    self.server.hub[f"{owner}/{name}"].files[value["path"]] = self.server.blobs[value["oid"]]
            return self.answer(
                {"commitUrl": f"{self.server.address}/{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        if verb == "tag":
            self.server.hub[f"{owner}/{name}"].tags.append(json.loads(body)["tag"])
        return self.answer({})

    def do_PUT(self) -> None:
        """Take a large file."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[self.path.rpartition("/")[2]] = content
        self.answer({})

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
