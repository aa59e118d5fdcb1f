"""The endpoints of the loopback Hub, see `loopback_hub`: each answers as the Hub does, from memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from tests.loopback_hub import LoopbackHub

WRITE_TOKEN, READ_TOKEN = "hf_loopback_write", "hf_loopback_read"
_ROLES = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Request:
    """One request as it was answered."""

    method: str
    path: str
    status: int
    sent: int  # bytes of file content
    authorized: bool


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match; see `LoopbackHub.fault`."""

    path: re.Pattern
    method: str
    times: int
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    drop_after: int | None = None
    truncate: int | None = None
    corrupt: bool = False
    delay: float = 0.0


@dataclass
class Repo:
    """Commits (id -> path -> content) and where the branches point."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], ref: str, message: str) -> str:
        text = f"{self.refs.get(ref)}{len(self.commits)}{sorted((k, sha256(v)) for k, v in files.items())}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.refs[ref] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubError(Exception):
    """An answer with an error status, in the Hub's own words."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        self.status, self.message, self.code, self.headers = status, message, code, headers


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_lfs(content: bytes) -> bool:
    return b"\0" in content[:512] or len(content) > 10_000_000


def _oid(content: bytes) -> str:
    """sha256 of what lies in LFS, git's blob id of the rest."""
    return sha256(content) if is_lfs(content) else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self._body()
        split = urlsplit(self.path)
        self.parts, self.query = unquote(split.path).strip("/"), parse_qs(split.query)
        self.role = _ROLES.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        with self.hub.lock:
            matching = [
                f
                for f in self.hub.faults
                if f.times > 0 and f.method in ("", self.command) and f.path.search(self.path)
            ]
            self.fault = matching[0] if matching else None
            if self.fault:
                self.fault.times -= 1
        if self.fault:
            time.sleep(self.fault.delay)
        try:
            if self.fault and self.fault.status:
                raise HubError(self.fault.status, self.fault.message or "injected", **self.fault.headers)
            if self.headers.get("Authorization") and self.role is None:
                raise HubError(401, "Invalid credentials in Authorization header")
            with self.hub.lock:
                answer = self._route(body)
            self._send(*answer) if isinstance(answer, tuple) else self._json(answer)
        except HubError as error:
            headers = {"X-Error-Message": error.message, **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._json({"error": error.message}, error.status, headers)
        except (BrokenPipeError, ConnectionResetError):  # the client went away
            self.close_connection = True
        except Exception as error:
            self.hub.crashes.append(error)
            self._json({"error": repr(error)}, 418)

    do_HEAD = do_POST = do_PUT = do_GET

    # ------------------------------------------------------------------------------------------------- in and out

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self._send(status, {"Content-Type": "application/json", **(headers or {})}, content, counted=False)

    def _send(self, status: int, headers: Mapping[str, str], content: bytes = b"", counted: bool = True) -> None:
        fault = self.fault if counted and content and self.command == "GET" else None
        if fault and fault.corrupt:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if fault and fault.truncate is not None:
            content = content[: fault.truncate]
        length = len(content)
        if fault and fault.drop_after is not None:
            content = content[: fault.drop_after]
            self.close_connection = True
        sent = 0 if self.command == "HEAD" or not counted else len(content)
        authorized = "Authorization" in self.headers
        self.hub.requests.append(Request(self.command, self.path, status, sent, authorized))
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ------------------------------------------------------------------------------------------------------ routes

    def _route(self, body: bytes) -> Any:
        path = self.parts
        if path == "api/whoami-v2":
            return self._whoami()
        if path == "api/repos/create":
            return self._create(json.loads(body))
        if path == "api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if match := re.fullmatch(r"store/(\w{64})", path):
            return self._stored(match[1], body)
        if match := re.fullmatch(r"(.+)\.git/info/lfs/objects/batch", path):
            return self._batch(self._repo("model", match[1], write=True), json.loads(body))
        if match := re.fullmatch(r"(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            kind = _KINDS[match[1] or "models"]
            return self._resolve(self._repo(kind, match[2]), *match.group(3, 4))
        pattern = r"api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit|paths-info)/(.+))?"
        if match := re.fullmatch(pattern, path):
            action = match[3] or "revision"
            repo = self._repo(_KINDS[match[1]], match[2], write=action in ("commit", "preupload"))
            return getattr(self, "_" + action.replace("-", "_"))(repo, match[2], match[4] or "main", body)
        raise HubError(404, f"No such endpoint: {self.command} {self.path}")

    def _repo(self, kind: str, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and self.role is None):
            raise HubError(404 if self.role else 401, "Repository not found", "RepoNotFound")
        if write and self.role != "write":
            raise HubError(403 if self.role else 401, "You must use a write token to upload to a repository.")
        return repo

    def _commit_id(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def _whoami(self) -> Any:
        if self.role is None:
            raise HubError(401, "Invalid username or password.")
        org = {"type": "org", "name": "org", "roleInOrg": self.role}
        token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": self.role}}
        return {"type": "user", "id": "1", "name": "tester", "orgs": [org], "auth": token}

    def _create(self, asked: Mapping[str, Any]) -> Any:
        if self.role is None:
            raise HubError(401, "Invalid username or password.")
        if self.role != "write" or asked.get("organization") not in (None, "org", "tester"):
            name = asked.get("organization")
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{name}".')
        repo_id = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        key = (asked.get("type") or "model", repo_id)
        url = f"{self.hub.url}/{repo_id}"
        if key in self.hub.repos:
            content = json.dumps({"error": "You already created this model repo", "url": url}).encode()
            return 409, {"Content-Type": "application/json"}, content, False
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repos[key] = repo = Repo(private=private)
        repo.commit(
            {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "main", "initial commit"
        )
        return {"url": url, "name": repo_id, "id": "1"}

    def _validate(self, content: str) -> Any:
        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if not block:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            yaml.safe_load(block[1])
        except yaml.YAMLError as error:
            answer = json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode()
            return 400, {"Content-Type": "application/json"}, answer, False
        return {"errors": [], "warnings": []}

    def _preupload(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> Any:
        here = repo.commits[self._commit_id(repo, revision)]
        files = []
        for file in json.loads(body)["files"]:
            binary = b"\0" in base64.b64decode(file["sample"]) or file["size"] > 10_000_000
            known = {"oid": _oid(here[file["path"]])} if file["path"] in here else {}
            mode = "lfs" if binary else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": files}

    def _batch(self, repo: Repo, asked: Mapping[str, Any]) -> Any:
        objects = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.store:
                answer["actions"] = {"upload": {"href": f"{self.hub.store_url}/store/{wanted['oid']}"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def _stored(self, oid: str, body: bytes) -> Any:
        if self.command == "PUT":
            if sha256(body) != oid:
                raise HubError(400, "The content does not have the sha256 it was announced with.")
            self.hub.store[oid] = body
            return {}
        if oid not in self.hub.store:
            raise HubError(404, "No such object")
        return self._file(self.hub.store[oid], {"ETag": f'"{oid}"'})

    def _commit(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> Any:
        files = dict(repo.commits[self._commit_id(repo, revision)])
        message = ""
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.store:
                    raise HubError(400, f"{value['path']} points to an object that was not uploaded.")
                files[value["path"]] = self.hub.store[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        if "create_pr" in self.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            oid = repo.commit(files, f"refs/pr/{number}", message)
            extra = {"pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/{number}"}
        else:
            oid, extra = repo.commit(files, revision, message), {}
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", **extra}

    def _resolve(self, repo: Repo, revision: str, name: str) -> Any:
        oid = self._commit_id(repo, revision)
        headers = {"X-Repo-Commit": oid}
        if name not in repo.commits[oid]:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        content = repo.commits[oid][name]
        etag = f'"{_oid(content)}"'
        if not is_lfs(content):
            return self._file(content, {**headers, "ETag": etag})
        location = f"{self.hub.store_url}/store/{_oid(content)}"
        return 302, {**headers, "X-Linked-ETag": etag, "X-Linked-Size": str(len(content)), "Location": location}

    def _file(self, content: bytes, headers: Mapping[str, str]) -> tuple:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return 200, {"Accept-Ranges": "bytes", **headers}, content
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        where = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        return 206, {**headers, **where}, content[start : end + 1]

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
        if is_lfs(content):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def _tree(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> Any:
        return [self._entry(*item) for item in repo.commits[self._commit_id(repo, revision)].items()]

    def _paths_info(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> Any:
        wanted = parse_qs(body.decode())["paths"]  # the client sends this one as a form
        files = repo.commits[self._commit_id(repo, revision)]
        return [self._entry(name, files[name]) for name in wanted if name in files]

    def _revision(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> Any:
        oid = self._commit_id(repo, revision)
        siblings = []
        for name, content in repo.commits[oid].items():
            siblings.append({"rfilename": name})
            if "blobs" in self.query:
                entry = self._entry(name, content)
                siblings[-1] |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    siblings[-1]["lfs"] = {"sha256": entry["oid"], "size": entry["size"], "pointerSize": 134}
        return {
            "_id": "1",
            "id": repo_id,
            "modelId": repo_id,
            "sha": oid,
            "private": repo.private,
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
