"""Publish a model folder on the Hugging Face Hub: checks, one commit, and a look at what comes back."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn

from ..errors import EtfZooError, LoadError
from ..ood import FAMILIARITY_NAME
from ..weights.download import LOG_IN, download, hub_errors, retry, sha256
from ..weights.native import CONFIG_NAME, RECORD_NAME, WEIGHTS_NAME, cards_folder, recorded_location
from .card import CARD_NAME, METRICS_NAME, card_problems, render_card

__all__ = ["Publication", "folder_problems", "publish", "zoo_folders"]

# and the card
FILES = (WEIGHTS_NAME, CONFIG_NAME, METRICS_NAME, FAMILIARITY_NAME, "metrics.jsonl", "recipe.yaml", "curve.png")
# An absolute path, a home folder or a drive, after a space, a quote, an equals sign or at the start of a line.
_PATH = re.compile(
    r"(?:(?<=[\s\"'`=(:,])|^)(?:/[\w.@+-]+/[\w.@+/-]+|~[\w-]*/[\w./-]+|[A-Za-z]:\\+[\w.\\ -]+)", re.MULTILINE
)
_NEUTRAL = {CARD_NAME, ".gitattributes", "LICENSE", "LICENSE.txt", "LICENSE.md"}  # no sign of another model


@dataclass(frozen=True)
class Publication:
    """Where a model folder lies on the Hub.

    Attributes:
        repo_id: `"ORG/NAME"`.
        url: Page of the repository, or of the pull request.
        revision: Commit id; empty after a dry run.
        files: Names of the files that were, or would be, in the commit; the Hub's client leaves out unchanged ones.
        changed: Whether there was anything to commit.
    """

    repo_id: str
    url: str
    revision: str
    files: tuple[str, ...]
    changed: bool


def folder_problems(folder: str | Path) -> list[str]:
    """Why a model folder should not be published yet, one line each that names the fix; offline.

    Checked: files, hash, label names, card, license, figures, that no file names a place on this machine, and that the
    model loads and gives finite logits.
    """
    folder = Path(folder)
    missing = [name for name in (WEIGHTS_NAME, CONFIG_NAME) if not (folder / name).is_file()]
    if missing:
        return [f"{' and '.join(missing)} missing: export the run again, with its weights"]
    problems = [*card_problems(folder), *_paths(folder)]
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if len(config.get("label_names") or ()) != config["num_classes"]:
        problems.append(f"{CONFIG_NAME} has no `label_names` for its {config['num_classes']} classes: put them there")
    if config.get("weights_sha256") != sha256(folder / WEIGHTS_NAME):
        problems.append(f"the sha256 of {WEIGHTS_NAME} is not the one in {CONFIG_NAME}: export the model again")
    else:
        try:
            if not _logits(_load(f"local-dir:{folder}")).isfinite().all():
                problems.append("the model's logits are not finite: train it again")
        except (RuntimeError, ValueError) as error:
            problems.append(f"the model does not load: {error}")
    return problems


def publish(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
) -> Publication:
    """Publish a model folder: weights, config with label names, figures and card in one commit.

    What was sent is then downloaded into an empty cache and must give the same logits. The repository and its commit
    are recorded in the folder (`hub.json`); those of a model inside the installed package in the cache
    ($ETF_ZOO_CACHE), as the package stays as it is. Doing it again sends what has changed, if anything; after an
    interruption nothing that arrived is sent twice.

    Args:
        folder: Model folder, see `save_folder`, with its card.
        repo_id: `"ORG/NAME"`; the recorded one by default. Made if need be.
        private: Whether a new repository is private.
        create_pr: Whether to open a pull request on an existing repository instead; nothing is recorded then.
        dry_run: Whether to stop after the checks; nothing is sent, and no network needed.

    Raises:
        ValueError: If the folder is not ready, or the repository holds something else.
        RuntimeError: If the Hub refuses, cannot be reached, or gives back something else than was sent.
    """
    folder = Path(folder)
    records = _records(folder)
    place = recorded_location(records) or recorded_location(folder)
    repo_id = repo_id or (place[0] if place else "")
    check_repo_id(repo_id)
    if problems := folder_problems(folder):
        raise EtfZooError(f"{folder} is not ready to be published: {'; '.join(problems)}.")
    card = render_card(folder, repo_id=repo_id)
    files = tuple(name for name in FILES if (folder / name).is_file())

    def operations() -> list[CommitOperationAdd]:
        content = [CommitOperationAdd(name, folder / name) for name in files]
        return [*content, CommitOperationAdd(CARD_NAME, card.encode())]

    api = HfApi(library_name="etf-zoo")
    url = f"{api.endpoint}/{repo_id}"
    if dry_run:
        return Publication(repo_id, url, "", (*files, CARD_NAME), changed=False)
    if get_token() is None:
        raise LoadError(f"You are not logged in to the Hub: {LOG_IN}.")
    with hub_errors(repo_id):
        head = _head(api, repo_id, folder, private=private)
        if head is None and create_pr:
            raise EtfZooError(f"There is no {repo_id} to open a pull request on. Publish without --create-pr.")
        if head is None:
            retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        commit: Any = retry(
            lambda: api.create_commit(
                repo_id, operations(), commit_message=f"Publish {folder.resolve().name}", create_pr=create_pr
            )
        )
    done = Publication(repo_id, commit.pr_url or url, commit.oid, (*files, CARD_NAME), changed=commit.oid != head)
    if done.changed or place != (repo_id, commit.oid):
        _verify(folder, repo_id, commit.oid)
    if not create_pr:
        record = json.dumps({"repo_id": repo_id, "revision": commit.oid}, indent=1) + "\n"
        records.mkdir(parents=True, exist_ok=True)
        (records / RECORD_NAME).write_text(record, encoding="utf-8")
        (records / CARD_NAME).write_text(card, encoding="utf-8")
    return done


def check_repo_id(repo_id: str) -> None:
    """Raise EtfZooError unless an id is `ORG/NAME` as the Hub allows it."""
    reason = ""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " " + " ".join(str(error).split())
    parts = repo_id.split("/")
    if reason or len(parts) != 2 or not all(re.fullmatch(r"\w[\w.-]*", part, re.ASCII) for part in parts):
        raise EtfZooError(f"Name the repository as ORG/NAME with --repo-id; it is {repo_id!r}.{reason}")


def _records(folder: Path) -> Path:
    """Folder that says where a model was published: its own, but for models inside the installed package."""
    if folder.resolve().parent != installed_cards().resolve():
        return folder
    cache = os.environ.get("ETF_ZOO_CACHE") or Path.home() / ".cache" / "etf_zoo"
    return Path(cache) / "published" / folder.resolve().name


def installed_cards() -> Path:
    """Folder of the embedded models in an installed package; in a clone there is none."""
    return Path(__file__).parents[1] / "model_cards"


def _paths(folder: Path) -> list[str]:
    """Which of the texts to publish name a place on this machine."""
    problems = []
    for name in (*FILES, CARD_NAME):
        file = folder / name
        if not file.is_file() or file.suffix not in (".json", ".jsonl", ".yaml", ".md"):
            continue
        text = file.read_text(encoding="utf-8")
        if name == CONFIG_NAME:  # a class may be called /m/0abc
            config = json.loads(text)
            text = json.dumps({k: v for k, v in config.items() if not k.startswith("label_")})
        if found := _PATH.search(text):
            problems.append(f"{name} names a place on this machine, {found[0]!r}: put a name there")
    return problems


def zoo_folders() -> Iterator[Path]:
    """Model folders of the zoo that have weights."""
    return (path.parent for path in sorted(cards_folder().glob(f"*/{WEIGHTS_NAME}")))


def _head(api: HfApi, repo_id: str, folder: Path, *, private: bool) -> str | None:
    """Commit id that the repository is at, None if there is none; ValueError if it holds something else."""
    try:
        info = retry(lambda: api.model_info(repo_id))
    except RepositoryNotFoundError:
        return None
    if private and not info.private:
        raise EtfZooError(
            f"{repo_id} exists and is public. Make it private at {api.endpoint}/{repo_id}/settings first."
        )
    names = {file.rfilename for file in info.siblings or ()} - _NEUTRAL
    if CONFIG_NAME in names:
        theirs = json.loads(download(repo_id, CONFIG_NAME, revision=info.sha).read_text(encoding="utf-8"))
        ours = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if theirs.get("architecture") != ours["architecture"]:
            raise EtfZooError(
                f"{repo_id} holds another model, {theirs.get('architecture')}, not {ours['architecture']}. Choose "
                f"another --repo-id."
            )
    elif names:
        raise EtfZooError(f"{repo_id} holds something else ({', '.join(sorted(names)[:3])}). Choose another --repo-id.")
    return info.sha


def _verify(folder: Path, repo_id: str, revision: str) -> None:
    """Raise RuntimeError unless the model that an empty cache gets from the Hub is the folder's."""
    with tempfile.TemporaryDirectory() as empty, hub_errors(repo_id):
        theirs = _logits(_load(f"hf-hub:{repo_id}@{revision}", cache_dir=empty))
    if not torch.equal(theirs, _logits(_load(f"local-dir:{folder}"))):
        raise LoadError(
            f"{repo_id} was uploaded, but what comes back at {revision} gives other logits. Do not use it; publish "
            f"again, and report it if it stays so."
        )


def _load(name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, pretrained=True, **kwargs).eval()


@torch.inference_mode()
def _logits(model: nn.Module) -> Tensor:
    size = model.pretrained_cfg["input_size"]  # type: ignore[index]
    return model(torch.randn(2, *size, generator=torch.Generator().manual_seed(0)))  # type: ignore[misc]
