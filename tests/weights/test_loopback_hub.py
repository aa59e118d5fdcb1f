"""The loopback Hub answers huggingface_hub's client as the Hub does."""

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from etf_zoo.weights.download import retry
from tests.loopback_hub import READ_TOKEN, WRITE_TOKEN

BINARY = bytes(range(256)) * 4000
CARD = b"---\nlicense: mit\n---\n# Card\n"


def operations(**files):
    return [CommitOperationAdd(name.replace("_", "."), content) for name, content in files.items()]


def test_publish_and_download(hub, monkeypatch, tmp_path):
    hub.login(monkeypatch, WRITE_TOKEN)
    api = HfApi()
    assert api.whoami()["name"] == "tester"
    assert api.create_repo("org/model", private=True).repo_id == "org/model"
    assert api.create_repo("org/model", exist_ok=True).repo_id == "org/model"
    new = operations(README_md=CARD, model_bin=BINARY)
    first = api.create_commit("org/model", new, commit_message="first")
    assert hub.files("org/model")["model.bin"] == BINARY
    again = api.create_commit("org/model", operations(README_md=CARD, model_bin=BINARY), commit_message="again")
    assert again.oid == first.oid  # nothing changed, so no commit
    gone = api.create_commit("org/model", [CommitOperationDelete("README.md")], commit_message="without")
    assert set(hub.files("org/model", gone.oid)) == {".gitattributes", "model.bin"}

    info = api.model_info("org/model", revision=first.oid, files_metadata=True)
    assert info.sha == first.oid
    assert {s.rfilename: s.size for s in info.siblings}["model.bin"] == len(BINARY)
    assert {entry.path for entry in api.list_repo_tree("org/model")} == {".gitattributes", "model.bin"}
    assert api.get_paths_info("org/model", ["model.bin", "nothing"])[0].lfs.size == len(BINARY)
    path = snapshot_download("org/model", revision=first.oid)
    with open(path + "/model.bin", "rb") as file:
        assert file.read() == BINARY
    assert all(not request.authorized for request in hub.asked("/store/"))  # the token stays with the Hub
    hub.heal()
    hf_hub_download("org/model", "model.bin")
    assert hub.sent == 0  # the content is known by its etag
    assert len(hub.requests) == 1
    pull = api.create_commit("org/model", operations(a_txt=b"a"), commit_message="pull", create_pr=True)
    assert (pull.pr_num, "a.txt" in hub.files("org/model")) == (1, False)
    assert hf_hub_download("org/model", "a.txt", revision=pull.pr_revision)


def test_what_may_not_be_done(hub, monkeypatch):
    hub.add("org/model", {"a.txt": b"a"}, private=True)
    api = HfApi()
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/model", "a.txt")
    with pytest.raises(LocalTokenNotFoundError):
        api.whoami()
    hub.login(monkeypatch, READ_TOKEN)
    assert hf_hub_download("org/model", "a.txt")
    with pytest.raises(HfHubHTTPError, match="write token"):
        api.create_commit("org/model", operations(b_txt=b"b"), commit_message="b")
    with pytest.raises(HfHubHTTPError, match="rights"):
        api.create_repo("org/other")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/model", "b.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/model", "a.txt", revision="nowhere")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/nothing", "a.txt")
    hub.login(monkeypatch, "hf_wrong")
    with pytest.raises(HfHubHTTPError, match="401"):
        hf_hub_download("org/model", "c.txt")
    hub.login(monkeypatch, WRITE_TOKEN)
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.create_commit("org/model", operations(README_md=b"---\n- [\n---\n"), commit_message="bad card")


def test_faults(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    large = BINARY * 12
    hub.add("org/model", {"model.bin": BINARY, "large.bin": large})
    hub.fault("/store/", drop_after=11_000_000, times=1)
    with open(retry(lambda: hf_hub_download("org/model", "large.bin")), "rb") as file:
        assert file.read() == large
    first, second = hub.asked("/store/", "GET")
    assert (first.sent, second.sent < len(large)) == (11_000_000, True)  # resumed with a Range request
    hub.heal()
    hub.fault("/store/", truncate=1000)
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download("org/model", "model.bin", force_download=True)
    hub.heal()
    hub.fault("/store/", corrupt=True)
    with open(hf_hub_download("org/model", "model.bin", force_download=True), "rb") as file:
        assert file.read() != BINARY  # the client does not look: etf_zoo must
    hub.heal()
    hub.fault("/resolve/", status=503, times=1)
    assert hf_hub_download("org/model", "model.bin")
    hub.fault("/resolve/", status=429, headers={"Retry-After": "7"})
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("org/model", "other.bin")
