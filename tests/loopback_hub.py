"""A Hugging Face Hub on 127.0.0.1 for the tests: what huggingface_hub's real client calls, and faults on request.

It speaks the client's plain HTTP protocol (create, preupload, LFS batch, commit, resolve with its redirect to a store
on another origin, tree, revision, whoami), keeps everything in memory and counts what it sends. Xet and multi-part
uploads are not spoken: the client runs with `HF_HUB_DISABLE_XET=1`, so they stay untested.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from tests.loopback_server import READ_TOKEN, WRITE_TOKEN, Fault, Handler, Repo, Request, is_lfs, sha256

__all__ = ["READ_TOKEN", "WRITE_TOKEN", "LoopbackHub"]


class LoopbackHub:
    """The server; a context manager.

    `repos` maps (kind, "ORG/NAME") to `Repo`; `requests` lists what was asked; `sent` counts bytes of file content.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.store: dict[str, bytes] = {}  # LFS objects by sha256
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.crashes: list[Exception] = []  # of this server: raised at the end, as they are defects of the test
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.store_url = f"http://localhost:{self.port}"  # another origin, as the real Hub's file store is

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        huggingface_hub.close_session()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self.crashes:
            raise self.crashes[0]

    def use(self, monkeypatch, home: Path, token: str | None = None) -> None:
        """Point huggingface_hub in this process at this server, with a cache of its own and nothing of the user's.

        The client reads its environment once, at import, into `constants`; those are what is patched.
        """
        huggingface_hub.close_session()
        values = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        self.login(monkeypatch, token)

    @staticmethod
    def login(monkeypatch, token: str | None) -> None:
        """Set or remove the token that the client sends."""
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The same as `use`, for another process."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token or "",
        }

    def add(
        self, repo_id: str, files: Mapping[str, bytes | Path], *, kind: str = "model", private: bool = False
    ) -> str:
        """Put a repository there without the client (or one more commit); returns the commit's id."""
        contents = {name: c.read_bytes() if isinstance(c, Path) else c for name, c in files.items()}
        with self.lock:
            self.store.update({sha256(c): c for c in contents.values() if is_lfs(c)})
            repo = self.repos.setdefault((kind, repo_id), Repo(private=private))
            return repo.commit(contents, "main", "added by the test")

    def add_folder(self, repo_id: str, folder: Path, **kwargs: Any) -> str:
        """`add` with the files of a folder."""
        return self.add(repo_id, {path.name: path for path in folder.iterdir() if path.is_file()}, **kwargs)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a model repository holds at a revision."""
        repo = self.repos["model", repo_id]
        return repo.commits[repo.resolve(revision) or revision]

    def fault(self, path: str, *, method: str = "", times: int = 1_000_000, **what: Any) -> Fault:
        """Let requests fail.

        Args:
            path: Regular expression searched in the path; "/store/" is where the content of large files comes from.
            method: Only this one.
            times: How many requests; afterwards all is well again.
            **what: `status` (with `headers`, `message`): this answer, the request is not looked at.
                `drop_after`: the connection breaks after so many bytes of a file. `truncate`: a shorter file, with a
                matching length. `corrupt`: one bit in the middle flipped. `delay`: seconds before the answer.
        """
        fault = Fault(re.compile(path), method, times, **what)
        self.faults.append(fault)
        return fault

    def heal(self) -> None:
        """No faults any more, no requests counted."""
        self.faults.clear()
        self.requests.clear()

    @property
    def sent(self) -> int:
        """Bytes of file content sent since the start, or `heal`."""
        return sum(request.sent for request in self.requests)

    def asked(self, path: str, method: str = "") -> list[Request]:
        """Requests whose path matches."""
        return [r for r in self.requests if re.search(path, r.path) and r.method.startswith(method)]
