"""A double of the Hugging Face Hub over HTTP on this machine, from the standard library and PyYAML.

It answers what huggingface_hub, transformers and peft ask for when they create a repository, push to it and read it
back, so that `push_to_hub` and `from_pretrained` run for real against HF_ENDPOINT instead of being mocked.

    with HubDouble(upload_mode="lfs") as hub:      # HF_ENDPOINT must be set before huggingface_hub is imported
        os.environ["HF_ENDPOINT"] = hub.url
        hub.fail("/preupload/", status=503)        # the next such request fails, to test a retry
        hub.log                                    # (method, path, status) of every request

Upload mode "regular" takes weights inside the commit call; "lfs" takes them as the Hub does, by LFS batch, PUT and
verify, and wants HF_HUB_DISABLE_XET=1. There are no pull requests, tags, xet or checks of a card's metadata.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".parquet", ".arrow", ".zip", ".model")
TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
ISO = "2026-01-01T00:00:00.000Z"


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Store:
    """Repositories as {(type, id): {"commits": {oid: {path: entry}}, "refs": {branch: oid}, "private": bool}}."""

    def __init__(self, root: Path, upload_mode: str):
        self.root, self.mode, self.lock = root, upload_mode, threading.RLock()
        self.repos: dict[tuple[str, str], dict] = {}
        (root / "blobs").mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        sha = hashlib.sha256(data).hexdigest()
        (self.root / "blobs" / sha).write_bytes(data)
        return sha

    def has(self, sha):
        return (self.root / "blobs" / sha).exists()

    def get(self, sha):
        return (self.root / "blobs" / sha).read_bytes()

    def create(self, typ, rid, private=False):
        r = {"commits": {}, "refs": {}, "private": private, "log": []}
        self.repos[(typ, rid)] = r
        self.commit(r, "main", {}, "initial commit")
        return r

    def commit(self, repo, branch, tree, summary):
        oid = hashlib.sha1(json.dumps([summary, time.time_ns(), sorted(tree)]).encode()).hexdigest()
        repo["commits"][oid] = tree
        repo["refs"][branch] = oid
        repo["log"].append((oid, summary, branch))
        return oid

    def resolve(self, repo, rev):
        return repo["refs"].get(rev) or (rev if rev in repo["commits"] else None)

    def entry(self, data: bytes, lfs: bool):
        sha = self.put(data)
        return {"sha": sha, "size": len(data), "oid": git_oid(data), "lfs": lfs}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "hub_double"
    store: Store
    token: str | None
    log: list
    faults: list
    user = "tester"

    # ---- plumbing
    def log_message(self, *a):
        pass

    def reply(self, status=200, body=b"", headers=None):
        if not isinstance(body, (bytes, bytearray)):
            body = json.dumps(body).encode()
        self.send_response(status)
        h = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "X-Request-Id": "double",
            **(headers or {}),
        }
        for k, v in h.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.log.append((self.command, self.path, status))

    def error(self, status, code, msg):
        self.reply(
            status,
            {"error": msg},
            {"X-Error-Code": code, "X-Error-Message": msg} if code else {"X-Error-Message": msg},
        )

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            out = b""
            while n := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(n)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def authed(self):
        return self.token is None or self.headers.get("Authorization", "") == f"Bearer {self.token}"

    def handle_any(self):
        u = urlsplit(self.path)
        path, self.q = u.path, parse_qs(u.query)
        self.raw = self.body()
        for f in self.faults:
            if f[2] > 0 and re.search(f[0], self.path):
                f[2] -= 1
                return self.error(f[1], None, "injected fault")
        # PUT /_lfs/<sha> is a presigned URL on the real Hub: the client sends no Authorization header there
        write = (
            self.command in ("POST", "DELETE") and not path.endswith("/validate-yaml") and "/paths-info/" not in path
        )
        if write and not self.authed():
            return self.error(401, None, "Invalid username or password.")
        for method, rx, fn in ROUTES:
            if self.command in method and (m := re.fullmatch(rx, path)):
                with self.store.lock:
                    return fn(self, **{k: unquote(v) for k, v in m.groupdict().items() if v is not None})
        self.error(404, None, f"hub_double has no route for {self.command} {path}")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def repo(self, t, rid):
        r = self.store.repos.get((TYPES[t], rid))
        if r is None or (r["private"] and not self.authed()):
            self.error(404 if self.authed() else 401, "RepoNotFound", "Repository not found")
            return None
        return r

    def tree(self, repo, rev):
        oid = self.store.resolve(repo, rev)
        if oid is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return oid

    # ---- api
    def whoami(self):
        if not self.authed() or "Authorization" not in self.headers:
            return self.error(401, None, "Invalid credentials")
        self.reply(
            200,
            {
                "type": "user",
                "id": "1",
                "name": self.user,
                "fullname": self.user,
                "isPro": False,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "double", "role": "write"}},
            },
        )

    def validate_yaml(self):
        self.reply(200, {"errors": [], "warnings": []})

    def create_repo(self):
        p = json.loads(self.raw)
        typ = p.get("type") or "model"
        rid = f"{p.get('organization') or self.user}/{p['name']}"
        pre = "" if typ == "model" else typ + "s/"
        url = f"http://{self.headers['Host']}/{pre}{rid}"
        if (typ, rid) in self.store.repos:
            return self.reply(409, {"error": "You already created this repo", "url": url})
        self.store.create(typ, rid, private=p.get("visibility") == "private" or bool(p.get("private")))
        self.reply(200, {"url": url, "name": rid, "id": rid})

    def delete_repo(self):
        p = json.loads(self.raw)
        typ = p.get("type") or "model"
        rid = f"{p.get('organization') or self.user}/{p['name']}"
        self.reply(200, b"OK") if self.store.repos.pop((typ, rid), None) else self.error(
            404, "RepoNotFound", "Repository not found"
        )

    def preupload(self, t, rid, rev):
        if (r := self.repo(t, rid)) is None:
            return
        tree = r["commits"].get(self.store.resolve(r, rev) or "", {})
        out = []
        for f in json.loads(self.raw)["files"]:
            lfs = self.store.mode == "lfs" and f["path"].endswith(LFS_SUFFIXES)
            e = tree.get(f["path"])
            out.append(
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": (e["sha"] if e["lfs"] else e["oid"]) if e else None,
                }
            )
        self.reply(200, {"files": out, "commitOid": self.store.resolve(r, rev)})

    def lfs_batch(self, rid, t="models"):
        if self.repo(t, rid) is None:
            return
        base, objs = f"http://{self.headers['Host']}/_lfs", []
        for o in json.loads(self.raw)["objects"]:
            a = (
                None
                if self.store.has(o["oid"])
                else {
                    "upload": {"href": f"{base}/{o['oid']}", "header": {}},
                    "verify": {"href": f"{base}/{o['oid']}/verify", "header": {}},
                }
            )
            objs.append({"oid": o["oid"], "size": o["size"], "authenticated": True, **({"actions": a} if a else {})})
        self.reply(200, {"transfer": "basic", "objects": objs}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, sha):
        if hashlib.sha256(self.raw).hexdigest() != sha:
            return self.error(400, None, "sha256 mismatch")
        self.store.put(self.raw)
        self.reply(200)

    def lfs_verify(self, sha):
        self.reply(200, {}) if self.store.has(sha) else self.error(404, None, "no such object")

    def do_commit(self, t, rid, rev):
        if (r := self.repo(t, rid)) is None:
            return
        head = self.store.resolve(r, rev)
        if head is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        tree, summary = dict(r["commits"][head]), ""
        for line in self.raw.splitlines():
            op = json.loads(line)
            k, v = op["key"], op["value"]
            if k == "header":
                summary = v["summary"]
                if v.get("parentCommit") not in (None, head):
                    return self.error(412, None, "A commit has happened since. Please refresh and try again.")
            elif k == "file":
                tree[v["path"]] = self.store.entry(base64.b64decode(v["content"]), lfs=False)
            elif k == "lfsFile":
                if not self.store.has(v["oid"]):
                    return self.error(422, None, f"LFS object {v['oid']} was not uploaded")
                tree[v["path"]] = self.store.entry(self.store.get(v["oid"]), lfs=True)
            elif k == "deletedFile":
                if tree.pop(v["path"], None) is None:
                    return self.error(404, "EntryNotFound", "A file with this name doesn't exist")
            elif k == "deletedFolder":
                tree = {p: e for p, e in tree.items() if not p.startswith(v["path"].rstrip("/") + "/")}
        oid = self.store.commit(r, rev, tree, summary)
        out = {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"http://{self.headers['Host']}/{rid}/commit/{oid}",
            "hookOutput": "",
        }
        if self.q.get("create_pr") == ["1"]:
            out["pullRequestUrl"] = f"http://{self.headers['Host']}/{rid}/discussions/1"
        self.reply(200, out)

    def create_branch(self, t, rid, branch):
        if (r := self.repo(t, rid)) is None:
            return
        if branch in r["refs"]:
            return self.error(409, None, "Reference already exists")
        r["refs"][branch] = r["refs"]["main"]
        self.reply(200, {})

    def refs(self, t, rid):
        if (r := self.repo(t, rid)) is None:
            return
        self.reply(
            200,
            {
                "branches": [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": o} for b, o in r["refs"].items()],
                "tags": [],
                "converts": [],
                "pullRequests": [],
            },
        )

    def entry_json(self, p, e):
        d = {"type": "file", "path": p, "size": e["size"], "oid": e["oid"]}
        if e["lfs"]:
            d["lfs"] = {"oid": e["sha"], "size": e["size"], "pointerSize": 134}
        return d

    def info(self, t, rid, rev="main"):
        if (r := self.repo(t, rid)) is None or (oid := self.tree(r, rev)) is None:
            return
        tree = r["commits"][oid]
        card = {}
        if "README.md" in tree and (
            m := re.match(r"---\n(.*?)\n---", self.store.get(tree["README.md"]["sha"]).decode(), re.S)
        ):
            card = yaml.safe_load(m[1]) or {}
        self.reply(
            200,
            {
                "_id": "0",
                "id": rid,
                "modelId": rid,
                "author": rid.split("/")[0],
                "sha": oid,
                "lastModified": ISO,
                "createdAt": ISO,
                "private": r["private"],
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags", []),
                "cardData": card,
                "library_name": card.get("library_name"),
                "siblings": [
                    {
                        "rfilename": p,
                        "size": e["size"],
                        "blobId": e["oid"],
                        **({"lfs": {"sha256": e["sha"], "size": e["size"], "pointerSize": 134}} if e["lfs"] else {}),
                    }
                    for p, e in sorted(tree.items())
                ],
            },
        )

    def list_tree(self, t, rid, rev, sub=""):
        if (r := self.repo(t, rid)) is None or (oid := self.tree(r, rev)) is None:
            return
        sub = sub.strip("/")
        pre = sub + "/" if sub else ""
        rec = self.q.get("recursive", ["false"])[0].lower() in ("true", "1")
        out, dirs = [], set()
        for p, e in sorted(r["commits"][oid].items()):
            if not p.startswith(pre):
                continue
            rest = p[len(pre) :]
            parts = rest.split("/")
            for i in range(1, len(parts)):
                if rec or i == 1:
                    dirs.add(pre + "/".join(parts[:i]))
            if rec or len(parts) == 1:
                out.append(self.entry_json(p, e))
        if sub and not out and not dirs:
            return self.error(404, "EntryNotFound", f"{sub} does not exist on {rev}")
        self.reply(
            200,
            [
                {"type": "directory", "path": d, "size": 0, "oid": hashlib.sha1(d.encode()).hexdigest()}
                for d in sorted(dirs)
            ]
            + out,
        )

    def paths_info(self, t, rid, rev):
        if (r := self.repo(t, rid)) is None or (oid := self.tree(r, rev)) is None:
            return
        ct = self.headers.get("Content-Type", "")
        paths = json.loads(self.raw)["paths"] if "json" in ct else parse_qs(self.raw.decode()).get("paths", [])
        tree, out = r["commits"][oid], []
        for p in paths:
            if p in tree:
                out.append(self.entry_json(p, tree[p]))
            elif any(x.startswith(p.rstrip("/") + "/") for x in tree):
                out.append({"type": "directory", "path": p, "size": 0, "oid": "0" * 40})
        self.reply(200, out)

    def commits(self, t, rid, rev):
        if (r := self.repo(t, rid)) is None:
            return
        self.reply(
            200,
            [
                {"id": o, "title": s, "message": "", "authors": [{"user": self.user}], "date": ISO}
                for o, s, _ in reversed(r["log"])
            ],
        )

    def resolve(self, rid, rev, path, t="models"):
        if (r := self.repo(t, rid)) is None or (oid := self.tree(r, rev)) is None:
            return
        e = r["commits"][oid].get(path)
        if e is None:
            return self.reply(
                404,
                {"error": "Entry not found"},
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": oid},
            )
        data = self.store.get(e["sha"])
        h = {
            "X-Repo-Commit": oid,
            "ETag": f'"{e["sha"] if e["lfs"] else e["oid"]}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if e["lfs"]:
            h |= {"X-Linked-Etag": f'"{e["sha"]}"', "X-Linked-Size": str(e["size"])}
        m = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if m and self.command == "GET":
            a, b = int(m[1]), int(m[2] or len(data) - 1)
            if a >= len(data):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return self.reply(
                206, data[a : b + 1], h | {"Content-Range": f"bytes {a}-{min(b, len(data) - 1)}/{len(data)}"}
            )
        self.reply(200, data, h)

    def ok(self, **_):
        self.reply(200, {})


H = Handler
R = r"(?P<rid>[\w.-]+/[\w.-]+)"
T = r"(?P<t>models|datasets|spaces)"
REV = r"(?P<rev>[^/]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", H.whoami),
    (("POST",), r"/api/validate-yaml", H.validate_yaml),
    (("POST",), r"/api/repos/create", H.create_repo),
    (("DELETE",), r"/api/repos/delete", H.delete_repo),
    (("POST",), rf"/api/{T}/{R}/preupload/{REV}", H.preupload),
    (("POST",), rf"/api/{T}/{R}/commit/{REV}", H.do_commit),
    (("POST",), rf"/api/{T}/{R}/branch/(?P<branch>.+)", H.create_branch),
    (("GET",), rf"/api/{T}/{R}/refs", H.refs),
    (("GET",), rf"/api/{T}/{R}", H.info),
    (("GET",), rf"/api/{T}/{R}/revision/{REV}", H.info),
    (("GET",), rf"/api/{T}/{R}/tree/{REV}(?P<sub>/.*)?", H.list_tree),
    (("POST",), rf"/api/{T}/{R}/paths-info/{REV}", H.paths_info),
    (("GET",), rf"/api/{T}/{R}/commits/{REV}", H.commits),
    (("POST",), rf"/(?:(?P<t>datasets|spaces)/)?{R}\.git/info/lfs/objects/batch", H.lfs_batch),
    (("PUT",), r"/_lfs/(?P<sha>[0-9a-f]{64})", H.lfs_put),
    (("POST",), r"/_lfs/(?P<sha>[0-9a-f]{64})/verify", H.lfs_verify),
    (("GET", "HEAD"), rf"/(?:(?P<t>datasets|spaces)/)?{R}/resolve/{REV}/(?P<path>.+)", H.resolve),
    (("GET", "HEAD"), r"/api/telemetry/.*", H.ok),
]


class HubDouble:
    def __init__(self, port=0, upload_mode="regular", token=None, root=None):
        self._tmp = None if root else tempfile.TemporaryDirectory(prefix="hub_double_")
        self.store = Store(Path(root or self._tmp.name), upload_mode)
        self.log, self._faults = [], []
        h = type("H", (Handler,), {"store": self.store, "token": token, "log": self.log, "faults": self._faults})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), h)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def fail(self, regex, status=503, times=1):
        self._faults.append([regex, status, times])

    def start(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self._tmp and self._tmp.cleanup()

    __enter__ = start

    def __exit__(self, *a):
        self.stop()
