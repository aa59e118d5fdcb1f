"""Weights from the Hub, through huggingface_hub's own client and a loopback Hub: right, once, or a clear error."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants

import etf_zoo
from etf_zoo.sharing.folder import save_folder
from etf_zoo.weights import download as download_module
from etf_zoo.weights.download import download
from etf_zoo.weights.native import hub_location, native_tags, sha256
from tests.loopback_hub import READ_TOKEN

REPO = "org/tiny"
NATIVE = "mobilenetv3_small_100_etf.e27_tiny"
MODEL = f"hf-hub:{REPO}"

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture
def published(hub, folder):
    """The tiny model at `REPO`; returns the hub."""
    hub.commit = hub.add_folder(REPO, folder)
    return hub


def load(name=MODEL, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


@torch.no_grad()
def logits(model):
    size = model.pretrained_cfg["input_size"][-1]
    return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


def cached(home) -> list[Path]:
    """Every whole file of content in a cache; some versions of the client also keep a part, to resume it."""
    return [
        path
        for path in Path(home, "hub").rglob("*")
        if path.is_file() and not path.is_symlink() and "blobs" in path.parts and path.suffix != ".incomplete"
    ]


# ---------------------------------------------------------------------------------------------------------- it works


def test_twin_of_a_repository_and_nothing_twice(published, folder):
    reference = logits(load(f"local-dir:{folder}"))
    assert torch.equal(logits(load()), reference)
    published.heal()
    assert torch.equal(logits(load()), reference)
    assert published.sent == 0
    assert not published.asked("/store/")
    assert load(num_classes=7).num_classes == 7
    assert published.sent == 0


def test_revision_and_cache_folder(published, folder, tiny_model, tmp_path):
    reference = logits(load(f"local-dir:{folder}"))
    with torch.no_grad():
        tiny_model.conv_stem.weight.mul_(2)
    published.add_folder(REPO, save_folder(tiny_model, tmp_path / "newer"))
    pinned = load(f"{MODEL}@{published.commit}", cache_dir=str(tmp_path / "mine"))
    assert torch.equal(logits(pinned), reference)
    assert (tmp_path / "mine" / "models--org--tiny").is_dir()
    assert not (tmp_path / "home" / "hub").exists()
    assert not torch.equal(load().conv_stem.weight, pinned.conv_stem.weight)
    published.heal()
    load(f"{MODEL}@{published.commit}", cache_dir=str(tmp_path / "mine"))
    assert not published.requests  # a commit id needs not even be looked up


def test_weights_are_of_the_commit_of_the_config(published, folder, tiny_model, tmp_path, monkeypatch):
    """A push between the two requests must not mix two versions."""
    reference = load(f"local-dir:{folder}")
    original = download_module.hf_hub_download
    with torch.no_grad():
        tiny_model.conv_stem.weight.mul_(2)
    newer = save_folder(tiny_model, tmp_path / "newer")

    def push_after_config(repo_id, filename, **kwargs):
        path = original(repo_id, filename, **kwargs)
        if filename == "config.json":
            published.add_folder(REPO, newer)
        return path

    monkeypatch.setattr(download_module, "hf_hub_download", push_after_config)
    assert torch.equal(load().conv_stem.weight, reference.conv_stem.weight)


def test_private_repository(published, monkeypatch):
    published.repos["model", REPO].private = True
    with pytest.raises(Exception, match="Repository Not Found"):  # timm asks for the config first, in its own words
        load()
    published.login(monkeypatch, READ_TOKEN)
    assert load().num_classes == 5
    assert not any(request.authorized for request in published.asked("/store/"))


def test_offline(published, monkeypatch, folder):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="org/tiny is not in the cache and HF_HUB_OFFLINE is set"):
        download(REPO, "config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(load()), logits(load(f"local-dir:{folder}")))


def test_no_network_after_the_first_load(published):
    load()
    published.fault("", status=503)
    assert load().num_classes == 5


# ---------------------------------------------------------------------------------------------------- native weights


def test_source_hub_takes_the_published_weights(hub, monkeypatch):
    reference = load(NATIVE)
    assert not hub.requests  # embedded: no network
    monkeypatch.setenv("ETF_ZOO_SOURCE", "hub")
    with pytest.raises(RuntimeError, match=r"not published: there is no hub\.json .* set ETF_ZOO_HUB_ORG"):
        load(NATIVE)
    monkeypatch.setenv("ETF_ZOO_HUB_ORG", "org")
    with pytest.raises(RuntimeError, match=f"There is no model repository org/{NATIVE} at http.* that you may see"):
        load(NATIVE)
    hub.add_folder(f"org/{NATIVE}", Path(native_tags()[NATIVE][0].file).parent)
    assert torch.equal(logits(load(NATIVE)), logits(reference))
    assert hub.sent > 1e6
    hub.heal()
    load(NATIVE)
    assert hub.sent == 0


def test_another_file_under_the_published_name(hub, folder, monkeypatch):
    """An organization that holds other weights under the name of ours; they are whole, so none is fetched twice."""
    monkeypatch.setenv("ETF_ZOO_SOURCE", "hub")
    monkeypatch.setenv("ETF_ZOO_HUB_ORG", "org")
    hub.add_folder(f"org/{NATIVE}", folder)
    with pytest.raises(RuntimeError, match="is not the file that was published: its sha256 is"):
        load(NATIVE)
    assert len(hub.asked("/store/")) == 1


def test_unknown_source(monkeypatch):
    monkeypatch.setenv("ETF_ZOO_SOURCE", "web")
    with pytest.raises(RuntimeError, match="'web'; set it to one of auto, embedded, package, hub"):
        load(NATIVE)


def test_record_of_a_folder(folder, monkeypatch):
    assert hub_location(folder) is None
    (folder / "hub.json").write_text('{"repo_id": "org/x"')
    with pytest.raises(RuntimeError, match=r"hub\.json is not readable"):
        hub_location(folder)
    (folder / "hub.json").write_text('{"repo_id": "org/x", "revision": "abc"}')
    assert hub_location(folder) == ("org/x", "abc")
    monkeypatch.setenv("ETF_ZOO_HUB_ORG", "mine")
    assert hub_location(folder) == ("mine/model", None)


def test_embedded_tags_come_before_those_to_be_downloaded(folder, tmp_path):
    """The first is the default tag of an architecture."""
    zoo = tmp_path / "zoo"
    for tag in ("a", "b", "c"):
        shutil.copytree(folder, zoo / f"mobilenetv3_small_050_etf.{tag}")
    for tag in ("a", "c"):
        (zoo / f"mobilenetv3_small_050_etf.{tag}" / "model.safetensors").unlink()
    (zoo / "mobilenetv3_small_050_etf.a" / "hub.json").write_text('{"repo_id": "org/x", "revision": "abc"}')
    (zoo / "mobilenetv3_small_050_etf.b" / "hub.json").write_text("not looked at")
    tags = native_tags(zoo)
    assert list(tags) == ["mobilenetv3_small_050_etf.b", "mobilenetv3_small_050_etf.a"]
    assert tags["mobilenetv3_small_050_etf.a"][0].hf_hub_id == "org/x@abc"


SCRIPT = """
import sys, timm, torch, etf_zoo
from huggingface_hub import constants
assert etf_zoo.__file__.startswith(sys.argv[1]), etf_zoo.__file__
print(timm.list_pretrained("mobilenetv3_small_050_etf*"))
for constants.HF_HUB_OFFLINE in (False, True):
    model = timm.create_model("mobilenetv3_small_050_etf", pretrained=True).eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        print(model(x).double().sum().item(), model.pretrained_cfg["tag"])
"""


def test_not_embedded_is_downloaded_at_its_revision_by_two_processes_at_once(hub, folder, tmp_path):
    """A copy of the package, as installed, whose one model is published and not embedded."""
    site, home = tmp_path / "site", tmp_path / "other home"
    shutil.copytree(Path(etf_zoo.__file__).parent, site / "etf_zoo", ignore=shutil.ignore_patterns("model_cards"))
    own = site / "etf_zoo" / "model_cards" / "mobilenetv3_small_050_etf.test"
    own.mkdir(parents=True)
    shutil.copy(folder / "config.json", own)
    commit = hub.add_folder("org/published", folder)
    (own / "hub.json").write_text(json.dumps({"repo_id": "org/published", "revision": commit}))
    hub.add("org/published", {"model.safetensors": b"\0later, and of no concern"})

    hub.fault("/store/", times=2, drop_after=500_000)  # disturbed, too
    environment = {**os.environ, **hub.environment(home), "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", SCRIPT, str(site)]
    processes = [
        subprocess.Popen(command, env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    expected = f"{logits(load(f'local-dir:{folder}')).double().sum().item()} test"
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        listed, *sums = out.splitlines()
        assert "mobilenetv3_small_050_etf.test" in listed
        assert sums == [expected, expected]
    assert [sha256(path) for path in cached(home)] == [path.name for path in cached(home)]


# ------------------------------------------------------------------------------------------------------------ faults


def test_wrong_content_is_fetched_again_then_refused(published, folder, tmp_path):
    published.fault("/store/", corrupt=True, times=1)
    assert torch.equal(logits(load()), logits(load(f"local-dir:{folder}")))
    shutil.rmtree(tmp_path / "home")
    published.fault("/store/", corrupt=True)
    with pytest.raises(RuntimeError, match=r"model\.safetensors of org/tiny arrived damaged, and was removed"):
        load()
    assert not [path for path in cached(tmp_path / "home") if len(path.name) == 64]
    published.heal()
    assert load().num_classes == 5


def test_file_damaged_in_the_cache(published, folder, monkeypatch):
    reference = logits(load())
    weights = next(Path(constants.HF_HUB_CACHE).rglob("model.safetensors")).resolve()
    content = weights.read_bytes()
    for damaged in (content[:-100], content[:5000] + bytes([content[5000] ^ 1]) + content[5001:], b""):
        weights.write_bytes(damaged)
        assert torch.equal(logits(load()), reference)
    weights.write_bytes(content[:-100])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"removed from the cache. Unset HF_HUB_OFFLINE and load it again"):
        load()


def test_damaged_config_is_neither_used_nor_mended_in_secret(published):
    load()
    config = next(Path(constants.HF_HUB_CACHE).rglob("config.json")).resolve()
    config.write_text(config.read_text().replace('"crop_pct": 0.875', '"crop_pct": 0.870'))
    with pytest.raises(RuntimeError, match=r"config\.json of org/tiny arrived damaged, and was removed"):
        load()
    assert load().pretrained_cfg["crop_pct"] == 0.875


def test_cache_without_links(published, folder, monkeypatch):
    """As on systems that know none: no announced hash to be read off, the config's still counts."""
    original = download_module.hf_hub_download

    def copied(*args, **kwargs):
        path = Path(original(*args, **kwargs))
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        return str(path)

    monkeypatch.setattr(download_module, "hf_hub_download", copied)
    assert torch.equal(logits(load()), logits(load(f"local-dir:{folder}")))
    published.fault("/store/", corrupt=True)
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(RuntimeError, match="arrived damaged"):
        load()


def test_weights_that_do_not_belong_to_the_config(hub, folder):
    """A repository that was put together wrongly: the file is what the Hub announced, and still not the one meant."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["conv_stem.weight"] *= 2
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    hub.add_folder(REPO, folder)
    with pytest.raises(RuntimeError, match="not the file that was published"):
        load()


def test_repository_without_a_recorded_hash_is_checked_against_the_hubs(hub, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"], config["config_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    hub.add_folder(REPO, folder)
    hub.fault("/store/", corrupt=True)
    with pytest.raises(RuntimeError, match="arrived damaged"):
        load()
    hub.heal()
    assert load().num_classes == 5


@pytest.mark.parametrize("fault", [{"truncate": 1000}, {"drop_after": 1000}, {"status": 500}])
def test_trouble_that_passes(published, folder, fault, no_waiting):
    published.fault("/store/", times=2, **fault)
    assert torch.equal(logits(load()), logits(load(f"local-dir:{folder}")))
    assert no_waiting


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"truncate": 1000}, "cut short on the way. Try again"),
        ({"drop_after": 0}, "Cannot reach http"),
        ({"status": 500}, r"The Hub is in trouble \(500: injected\). Try again later"),
        ({"status": 401}, "does not accept your token .*hf auth login"),
        ({"status": 403}, "may not do this with org/tiny .*hf auth login"),
        ({"status": 404}, r"refused a request about org/tiny \(404"),
        ({"status": 429, "headers": {"Retry-After": "3"}}, "limits your requests for now: wait 3 s, or log in"),
    ],
)
def test_trouble_that_stays(published, tmp_path, fault, message):
    download(REPO, "config.json")
    published.fault("/store/", **fault)
    with pytest.raises(RuntimeError, match=message):
        load()
    assert [path.stat().st_size for path in cached(tmp_path / "home")] == [len(published.files(REPO)["config.json"])]
    published.heal()
    assert load().num_classes == 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 401, "message": "Invalid credentials in Authorization header"}, "does not accept your token"),
        ({"status": 401, "headers": {"X-Error-Code": "RepoNotFound"}}, "no model repository org/tiny .* you may see"),
        ({"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, "org/tiny is gated: accept its terms at http"),
        ({"status": 403}, "may not do this"),
        ({"status": 404, "headers": {"X-Error-Code": "RevisionNotFound"}}, "org/tiny has no such revision"),
        ({"status": 404, "headers": {"X-Error-Code": "EntryNotFound"}}, "org/tiny lacks a file"),
        ({"status": 429, "headers": {"Retry-After": "300"}}, "wait 300 s"),
        ({"status": 502}, "The Hub is in trouble"),
    ],
)
def test_answers_that_refuse(published, fault, message):
    published.fault("/resolve/", **fault)
    with pytest.raises(RuntimeError, match=message) as raised:
        download(REPO, "model.safetensors")
    assert "\n" not in str(raised.value)


def test_no_server_at_all(published, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    with pytest.raises(RuntimeError, match=r"Cannot reach http://127.0.0.1:9 for org/tiny: .* Check the network"):
        download(REPO, "config.json")


def test_full_disk(published, tmp_path):
    download(REPO, "config.json")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # the weights are larger
    try:
        with pytest.raises(RuntimeError, match=r"The disk is full: org/tiny could not be stored .* HF_HUB_CACHE"):
            load()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(cached(tmp_path / "home")) == 1
    assert load().num_classes == 5


def test_folder_that_cannot_be_written(published, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match=r"Not a directory|File exists|Set HF_HUB_CACHE"):
        download(REPO, "config.json", cache_dir=tmp_path / "file")
