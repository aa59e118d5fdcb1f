"""Publishing through huggingface_hub's own client to a loopback Hub, and getting the same back."""

import json
import shutil

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard, constants

from etf_zoo.sharing import card as card_module
from etf_zoo.sharing import publish as publish_module
from etf_zoo.sharing.card import write_card
from etf_zoo.sharing.folder import save_folder
from etf_zoo.sharing.publish import folder_problems, publish
from etf_zoo.weights import native as pretrained_module
from etf_zoo.weights.native import cards_folder, recorded_location, sha256
from etf_zoo_cli import main
from tests.loopback_hub import READ_TOKEN, WRITE_TOKEN
from tests.sharing.test_card import METRICS

REPO = "org/tiny"
SENT = {"model.safetensors", "config.json", "metrics.json", "README.md"}

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture
def hub(hub, monkeypatch):
    """The loopback Hub, with a token that may write."""
    hub.login(monkeypatch, WRITE_TOKEN)
    return hub


def with_card(folder):
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    write_card(folder)
    return folder


@pytest.fixture
def folder(folder):
    return with_card(folder)


@torch.no_grad()
def logits(name, **kwargs):
    model = timm.create_model(name, pretrained=True, **kwargs).eval()
    size = model.pretrained_cfg["input_size"]
    return model(torch.randn(2, *size, generator=torch.Generator().manual_seed(1)))


# ---------------------------------------------------------------------------------------------------------- it works


def test_one_commit_that_comes_back_the_same_and_is_recorded(hub, folder):
    (folder / "checkpoint.bin").write_bytes(b"not to be published")
    reference = logits(f"local-dir:{folder}")
    done = publish(folder, REPO)
    assert done.changed
    assert done.url == f"{hub.url}/{REPO}"
    assert hub.repos["model", REPO].messages == ["initial commit", "Publish model"]
    assert hub.files(REPO).keys() - {".gitattributes"} == SENT
    assert recorded_location(folder) == (REPO, done.revision)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in card.text
    assert card.content == (folder / "README.md").read_text()
    assert torch.equal(logits(f"hf-hub:{REPO}"), reference)
    hub.heal()
    assert torch.equal(logits(f"hf-hub:{REPO}"), reference)
    assert hub.sent == 0


def test_again_sends_what_changed_or_nothing(hub, folder, tiny_model):
    first = publish(folder, REPO)
    hub.heal()
    again = publish(folder)  # the recorded repository
    assert (again.changed, again.revision) == (False, first.revision)
    assert not hub.asked("/commit/")
    assert not hub.asked("/store/")

    (folder / "metrics.json").write_text(json.dumps({**METRICS, "limits": "Other words."}))
    write_card(folder)
    hub.heal()
    third = publish(folder)
    assert third.changed
    assert not hub.asked("/store/", "PUT")  # the weights are there
    assert len(hub.asked("/commit/")) == 1
    assert b"Other words." in hub.files(REPO)["README.md"]


def test_private_and_pull_request(hub, folder, monkeypatch):
    publish(folder, REPO, private=True)
    assert hub.repos["model", REPO].private
    with pytest.raises(ValueError, match="There is no org/other to open a pull request on"):
        publish(folder, "org/other", create_pr=True)
    (folder / "metrics.json").write_text(json.dumps({**METRICS, "limits": "Other words."}))
    write_card(folder)
    recorded = recorded_location(folder)
    pull = publish(folder, create_pr=True)
    assert pull.url == f"{hub.url}/{REPO}/discussions/1"
    assert b"Other words." not in hub.files(REPO)["README.md"]
    assert b"Other words." in hub.files(REPO, "refs/pr/1")["README.md"]
    assert recorded_location(folder) == recorded


def test_dry_run_sends_nothing(hub, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = publish(folder, REPO, dry_run=True)
    assert set(done.files) == SENT
    assert not hub.requests
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_whole_zoo(hub, tmp_path, monkeypatch, capsys):
    """Every folder with weights and a few more kinds: published, downloaded into an empty cache, identical, once."""
    zoo = tmp_path / "zoo"
    shutil.copytree(cards_folder(), zoo)
    torch.manual_seed(0)
    kinds = {
        "_etf.mlp": {"neck": "mlp"},
        "_etf.batch": {"feature_norm": "batch", "frame": "random"},
        "_etf.many": {"num_classes": 1100},
        "_control.plain": {},
    }
    for kind, kwargs in kinds.items():
        architecture = "mobilenetv3_small_050" + kind.split(".")[0].removesuffix("_control")
        model = timm.create_model(architecture, **{"num_classes": 5, **kwargs})
        save_folder(
            model,
            zoo / f"mobilenetv3_small_050{kind}",
            pretrained_cfg={"input_size": (3, 32, 32), "license": "mit", "tag": kind.split(".")[1]},
            label_names=[str(i) for i in range(model.num_classes)],
        )
    for module in (card_module, pretrained_module, publish_module):
        monkeypatch.setattr(module, "cards_folder", lambda: zoo)
    for kind in kinds:
        with_card(zoo / f"mobilenetv3_small_050{kind}")
    folders = [path.parent for path in sorted(zoo.glob("*/model.safetensors"))]
    assert len(folders) >= 5

    assert main(["publish", "--all", "--org", "org"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [folder.name for folder in folders]
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    for folder in folders:
        assert torch.equal(logits(f"hf-hub:org/{folder.name}"), logits(f"local-dir:{folder}"))
    hub.heal()
    for folder in folders:
        logits(f"hf-hub:org/{folder.name}")
    assert hub.sent == 0
    hub.heal()
    assert main(["publish", "--all", "--org", "org"]) == 0
    assert all("unchanged" in line for line in capsys.readouterr().out.splitlines())
    assert not hub.asked("/commit/")

    monkeypatch.setenv("ETF_ZOO_SOURCE", "hub")
    for name, (cfg, _) in pretrained_module.native_tags(zoo).items():
        stored = safetensors.torch.load_file(zoo / name / "model.safetensors")
        weights = pretrained_module.read_weights(cfg.to_dict())
        assert all(torch.equal(weights[key], value) for key, value in stored.items())
        assert hub.repos["model", f"org/{name}"].refs["main"] == recorded_location(zoo / name)[1]
    assert hub.sent == 0  # in the cache under the recorded commit


# ------------------------------------------------------------------------------------------------------------ checks


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in {**changes, "config_sha256": None}.items():
        config.pop(key, None) if value is None else config.update({key: value})
    (folder / "config.json").write_text(json.dumps(config))
    return config


def without_license(folder):
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    change_config(folder, pretrained_cfg={**cfg, "license": None})
    write_card(folder)


def unmeasured(folder):
    (folder / "metrics.json").write_text(json.dumps({**METRICS, "results": {}}))
    write_card(folder)


def edited(folder):
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("12.3", "92.3"))


def other_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def unloadable(folder):
    (folder / "model.safetensors").write_bytes(b"nonsense")
    change_config(folder, weights_sha256=sha256(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors missing: export the run again"),
        (lambda f: (f / "config.json").unlink(), r"config\.json missing"),
        (lambda f: (f / "README.md").unlink(), r"there is no README\.md: run `etf-zoo card"),
        (lambda f: (f / "metrics.json").unlink(), r"metrics\.json is missing"),
        (edited, r"README\.md is not what config\.json and metrics\.json say: run `etf-zoo card"),
        (without_license, "no license is stated: put one into `license`"),
        (unmeasured, r"no figures: metrics\.json has no top1"),
        (lambda f: change_config(f, label_names=None), "no `label_names` for its 5 classes"),
        (other_weights, "sha256 of model.safetensors is not the one"),
        (unloadable, "the model does not load: .* not a readable safetensors file"),
    ],
)
def test_not_ready(hub, folder, spoil, message):
    assert not folder_problems(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=f"is not ready to be published: .*{message}"):
        publish(folder, REPO)
    assert not hub.requests


@pytest.mark.parametrize("repo_id", [None, "tiny", "org/", "org/tiny/more"])
def test_repository_id(hub, folder, repo_id):
    with pytest.raises(ValueError, match="Name the repository as ORG/NAME with --repo-id"):
        publish(folder, repo_id)


def test_name_that_the_hub_does_not_allow(hub, folder):
    with pytest.raises(ValueError, match="Repo id must"):
        publish(folder, "org/not allowed")


def test_repository_that_holds_something_else(hub, folder):
    hub.add("org/bert", {"config.json": b'{"architecture": "bert"}', "model.safetensors": b"\0"})
    with pytest.raises(ValueError, match="org/bert holds another model, bert, not mobilenetv3_small_050_etf"):
        publish(folder, "org/bert")
    hub.add("org/files", {"novel.txt": b"Chapter 1"})
    with pytest.raises(ValueError, match=r"org/files holds something else \(novel\.txt\)"):
        publish(folder, "org/files")
    hub.add("org/public", {"README.md": b"# Soon\n"})
    with pytest.raises(ValueError, match="org/public exists and is public"):
        publish(folder, "org/public", private=True)
    assert publish(folder, "org/public").changed
    hub.add("org/data", {"a.txt": b"a"}, kind="dataset")  # lives under another address
    assert publish(folder, "org/data").changed
    assert hub.repos["dataset", "org/data"].messages == ["added by the test"]


# ------------------------------------------------------------------------------------------------------------ faults


def test_who_may_not(hub, folder, monkeypatch):
    hub.login(monkeypatch, None)
    with pytest.raises(RuntimeError, match="You are not logged in to the Hub: log in with `hf auth login`"):
        publish(folder, REPO)
    assert not hub.requests
    hub.login(monkeypatch, READ_TOKEN)
    with pytest.raises(RuntimeError, match=r"Your token may not do this with org/tiny .*rights.* write access"):
        publish(folder, REPO)
    hub.add(REPO, {"README.md": b"# Soon\n"})
    with pytest.raises(RuntimeError, match=r"Your token may not do this with org/tiny .*write token"):
        publish(folder, REPO)
    hub.login(monkeypatch, "hf_expired")
    with pytest.raises(RuntimeError, match=r"The Hub does not accept your token \(Invalid credentials"):
        publish(folder, REPO)
    hub.login(monkeypatch, WRITE_TOKEN)
    with pytest.raises(RuntimeError, match="Your token may not do this with elsewhere/tiny"):
        publish(folder, "elsewhere/tiny")
    assert recorded_location(folder) is None


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("api/models/org/tiny$", {"status": 503}),
        ("repos/create", {"status": 500}),
        ("preupload", {"status": 502}),
        ("objects/batch", {"status": 429, "headers": {"Retry-After": "2"}}),
        ("/store/", {"status": 504}),
        ("/commit/", {"status": 503}),
        ("/commit/", {"status": 429, "headers": {"Retry-After": "2"}}),
    ],
)
def test_trouble_that_passes(hub, folder, where, fault, no_waiting):
    hub.fault(where, times=1, **fault)
    assert publish(folder, REPO).changed
    assert no_waiting
    assert hub.repos["model", REPO].messages == ["initial commit", "Publish model"]


@pytest.mark.parametrize(
    ("where", "fault", "message"),
    [
        (
            "repos/create",
            {"status": 429, "headers": {"Retry-After": "900"}},
            "limits your requests for now: wait 900 s",
        ),
        ("/store/", {"status": 500}, "The Hub is in trouble .* Try again later"),
        ("/commit/", {"status": 503}, "The Hub is in trouble .* Try again later"),
        ("/commit/", {"status": 413, "message": "too large"}, r"refused a request about org/tiny \(413: too large\)"),
    ],
)
def test_trouble_that_stays_then_run_again(hub, folder, where, fault, message):
    card = (folder / "README.md").read_text()
    hub.fault(where, **fault)
    with pytest.raises(RuntimeError, match=message):
        publish(folder, REPO)
    assert recorded_location(folder) is None
    assert (folder / "README.md").read_text() == card
    stored = len(hub.store)
    hub.heal()
    assert publish(folder, REPO).changed
    assert len(hub.asked("/store/", "PUT")) == 1 - stored  # what had arrived is not sent again
    assert hub.repos["model", REPO].messages == ["initial commit", "Publish model"]


def test_what_comes_back_is_looked_at(hub, folder):
    hub.fault("/store/", method="GET", corrupt=True)
    with pytest.raises(RuntimeError, match=r"model\.safetensors of org/tiny arrived damaged"):
        publish(folder, REPO)
    assert recorded_location(folder) is None
    hub.heal()
    assert not publish(folder, REPO).changed  # all there; now it is verified and recorded
    assert hub.asked("/store/", "GET")
    assert recorded_location(folder)


def test_other_logits(hub, folder, monkeypatch):
    original = publish_module._load
    monkeypatch.setattr(publish_module, "_load", lambda name, **k: original(name, **k).train("hf-hub" in name))
    with pytest.raises(RuntimeError, match=r"org/tiny was uploaded, but what comes back .* gives other logits"):
        publish(folder, REPO)


# ------------------------------------------------------------------------------------------------------ command line


def test_command_line(hub, folder, capsys):
    assert main(["publish", str(folder), "--repo-id", REPO, "--dry-run"]) == 0
    assert "ready; would send model.safetensors, config.json" in capsys.readouterr().out
    assert main(["publish", str(folder), "--repo-id", REPO]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"model: {hub.url}/{REPO} (commit ")
    assert main(["publish", str(folder)]) == 0
    assert "unchanged, at" in capsys.readouterr().out
    for wrong in ([], ["--all"], [str(folder), "--all", "--org", "o"], [str(folder), "--org", "o", "--repo-id", REPO]):
        assert main(["publish", *wrong]) == 1
        assert "with --repo-id ORG/NAME, or the zoo with --all --org ORG" in capsys.readouterr().err
    assert main(["publish", "nonsense", "--repo-id", REPO]) == 1
    assert "There is no model or folder 'nonsense'" in capsys.readouterr().err


def test_run_that_exported(folder, capsys, tmp_path):
    (folder / "README.md").unlink()
    assert main(["card", str(folder.parent)]) == 0  # the folder lies in RUN/model
    assert (folder / "README.md").is_file()
    assert main(["publish", str(folder.parent), "--repo-id", REPO, "--dry-run"]) == 0
    assert "ready" in capsys.readouterr().out


def test_offline(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE is set"):
        publish(folder, REPO)


def test_command_line_says_what_is_wrong_with_the_hub(hub, capsys):
    assert main(["info", "hf-hub:org/nothing"]) == 1
    error = capsys.readouterr().err
    assert "There is no model repository org/nothing" in error
    assert error.count("\n") == 1


# ------------------------------------------------------------------------------------------------- names and places


@pytest.mark.parametrize(
    "repo_id", ["a/..", "../a", "a/.", "a/b/c", "a", "a/", "/a", "a/b c", "a/-b", "a/b--c", "a/ü", "a/b\n"]
)
def test_ids_that_the_hub_does_not_take(folder, repo_id):
    with pytest.raises(ValueError, match="as ORG/NAME with --repo-id"):
        publish(folder, repo_id, dry_run=True)


@pytest.mark.parametrize(
    "text", ["/home/me/photos", "at /data/x", "--data=/mnt/d/x", "~/photos/x", "C:\\Users\\me", "~me/photos"]
)
def test_paths_are_not_published(folder, text):
    (folder / "metrics.json").write_text(json.dumps({**METRICS, "limits": f"Seen {text}"}))
    write_card(folder)
    problems = folder_problems(folder)
    assert any("metrics.json names a place on this machine" in problem for problem in problems)
    with pytest.raises(ValueError, match="names a place on this machine"):
        publish(folder, REPO, dry_run=True)


@pytest.mark.parametrize(
    "text", ["a/b", "https://example.org/a/b", "top-1/top-5", "arXiv 2402.18614/x", "50 %/class", "~5"]
)
def test_what_is_no_path(folder, text):
    (folder / "metrics.json").write_text(json.dumps({**METRICS, "limits": f"Seen {text}"}))
    write_card(folder)
    assert not folder_problems(folder)


def test_classes_may_be_called_like_paths(tiny_model, tmp_path):
    names = [f"/m/0{i}abc" for i in range(5)]
    cfg = {"input_size": (3, 32, 32), "license": "apache-2.0"}
    assert not folder_problems(
        with_card(save_folder(tiny_model, tmp_path / "m", pretrained_cfg=cfg, label_names=names))
    )


def test_the_installed_package_stays_as_it_is(hub, folder, tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "etf_zoo" / "model_cards"
    package.mkdir(parents=True)
    installed = package / "mobilenetv3_small_050_etf.test"
    shutil.copytree(folder, installed)
    before = {path.name: path.read_bytes() for path in installed.iterdir()}
    monkeypatch.setattr(publish_module, "installed_cards", lambda: package)
    monkeypatch.setenv("ETF_ZOO_CACHE", str(tmp_path / "cache"))
    done = publish(installed, REPO)
    assert {path.name: path.read_bytes() for path in installed.iterdir()} == before
    kept = tmp_path / "cache" / "published" / installed.name
    assert recorded_location(kept) == (REPO, done.revision)
    assert REPO in (kept / "README.md").read_text()
    assert not publish(installed).changed  # where it was published last is known
