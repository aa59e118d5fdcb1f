"""Sessions: what they change, what they cannot, and what they are by a plain loop."""

import copy
import json
import math

import pytest
import timm
import torch
from torch.nn import functional as F

from etf_zoo import FrameClassifier, attach_frame
from etf_zoo.errors import EtfZooError
from etf_zoo.models.find import load_model
from etf_zoo.sharing.folder import save_folder
from etf_zoo.trainer.tune.incremental import Memory, fit_neck, read_memory, write_memory
from etf_zoo.trainer.tune.tuning import Finetune
from etf_zoo_cli import main
from tests.made_data import write_folder

DIM, BASE, NEW = 24, 6, 4


@pytest.fixture(scope="module")
def clusters():
    """Features of ten classes `(10, 40, DIM)` about centers of their own."""
    generator = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(BASE + NEW, 1, DIM, generator=generator)
    return centers + 0.8 * torch.randn(BASE + NEW, 40, DIM, generator=generator)


@pytest.fixture(scope="module")
def trained(clusters):
    """A head with room whose neck knows the base classes."""
    torch.manual_seed(0)
    head = FrameClassifier(DIM, BASE, reserve=NEW, neck="residual")
    x, y = clusters[:BASE].flatten(0, 1), torch.arange(BASE).repeat_interleave(40)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(head(x), y).backward()
        optimizer.step()
    return head.eval()


def session(head, clusters, first, count=2, shots=5, **args):
    """Classes `first` and on; all before have a mean."""
    means = clusters[:first].mean(1)
    features = clusters[first : first + count, :shots].flatten(0, 1)
    head.add_classes(count)
    return fit_neck(head, means, features, torch.arange(first, first + count).repeat_interleave(shots), **args)


def test_a_session_is_what_a_plain_loop_does(trained, clusters):
    head, slow = copy.deepcopy(trained), copy.deepcopy(trained)
    final = session(head, clusters, BASE, steps=7, rate=2e-3)
    slow.add_classes(2)
    rows = [(clusters[k].mean(0), k) for k in range(BASE)]
    rows += [(clusters[k, i], k) for k in range(BASE, BASE + 2) for i in range(5)]
    counts = [1] * BASE + [5, 5]
    mean_count = sum(counts) / len(counts)
    optimizer = torch.optim.AdamW(slow.neck.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(8):
        loss = torch.zeros(())
        for x, k in rows:
            length = math.sqrt(mean_count / counts[k])
            cosine = F.normalize(slow.neck(x[None]), dim=1)[0] @ slow.weight[k]
            loss = loss + 0.5 * (length * cosine - length) ** 2 / len(rows)
        if step == 7:
            break
        optimizer.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / 7))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert final == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(head.neck.parameters(), slow.neck.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_new_classes_are_learned_and_the_frame_stays(trained, clusters):
    head, kept = copy.deepcopy(trained), {k: v.clone() for k, v in trained.state_dict().items()}
    x, y = clusters.flatten(0, 1), torch.arange(BASE + NEW).repeat_interleave(40)
    for first in (BASE, BASE + 2):
        session(head, clusters, first)
        found = head(x).argmax(1)
        assert found.max() < first + 2  # no class that has not come yet
        known = y < first + 2
        assert (found[known] == y[known]).float().mean() > 0.9
    changed = {name for name, value in head.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed == {f"neck.{name}" for name, _ in head.neck.named_parameters()}  # no statistics, frame or scale
    assert not head.training
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize("steps", [3, 200])
def test_old_images_are_lost_only_where_their_embedding_drifted(trained, clusters, steps):
    """A feature keeps its class while its margin exceeds its embedding's drift times the prototypes' distance."""
    head = copy.deepcopy(trained)
    x, y = clusters[:BASE].flatten(0, 1), torch.arange(BASE).repeat_interleave(40)
    cosines = trained.embed(x) @ trained.weight[: BASE + 2].T  # the new prototypes were there before, unseen
    own = cosines.gather(1, y[:, None])[:, 0]
    margin = own - cosines.scatter(1, y[:, None], -2.0).amax(1)
    session(head, clusters, BASE, steps=steps)
    drift = (head.embed(x) - trained.embed(x)).norm(dim=1)
    distance = (trained.weight[0] - trained.weight[1]).norm()
    safe = margin > drift * distance
    assert bool((head(x).argmax(1) == y)[safe].all())
    assert steps > 3 or safe.float().mean() > 0.5  # so that the line above says something


def test_order_of_sessions_does_not_change_the_frame(trained, clusters):
    one, other = copy.deepcopy(trained), copy.deepcopy(trained)
    swapped = clusters[[*range(BASE), BASE + 2, BASE + 3, BASE, BASE + 1]]
    for first in (BASE, BASE + 2):
        session(one, clusters, first, steps=5)
        session(other, swapped, first, steps=5)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.logit_scale, other.logit_scale)


def test_the_same_session_twice_is_the_same(trained, clusters):
    found = [copy.deepcopy(trained) for _ in range(2)]
    for head in found:
        session(head, clusters, BASE, steps=10)
    assert all(torch.equal(v, found[1].state_dict()[k]) for k, v in found[0].state_dict().items())


def test_errors_of_sessions(trained, clusters):
    means, x = clusters[:BASE].mean(1), clusters[BASE, :2]
    head = copy.deepcopy(trained)
    head.add_classes(1)
    y = torch.full((2,), BASE)
    for call, words in [
        (lambda: fit_neck(FrameClassifier(DIM, BASE, reserve=1), means, x, y), "nothing to fit"),
        (lambda: fit_neck(head, means, x, torch.zeros(2, dtype=torch.long)), "got counts"),
        (lambda: fit_neck(head, means[:-1], x, y), "got counts"),
        (lambda: fit_neck(head, means, x / 0, y), "not finite"),
        (lambda: fit_neck(head, means, x, y, steps=0), "at least one step"),
        (lambda: fit_neck(head, means, x, y, rate=0.0), "positive rate"),
    ]:
        with pytest.raises(EtfZooError, match=words):
            call()


def test_memory_is_the_class_means_and_is_its_model_s_own(tmp_path, clusters):
    features, labels = clusters[:3].flatten(0, 1), torch.arange(3).repeat_interleave(40)
    memory = Memory.of(features, labels, ["a", "b", "c"])
    torch.testing.assert_close(memory.means, clusters[:3].mean(1))
    joined = memory.joined(Memory.of(clusters[3], torch.zeros(40, dtype=torch.long), ["d"]))
    torch.testing.assert_close(joined.means, clusters[:4].mean(1))
    assert len(joined.held) == 0
    joined = joined.joined(Memory.of(clusters[4], torch.zeros(40, dtype=torch.long), ["e"], held=clusters[5]))
    write_memory(joined, tmp_path)
    again = read_memory(tmp_path, list("abcde"))
    assert torch.equal(again.means, joined.means)
    assert torch.equal(again.held, clusters[5])
    many = Memory.of(features, labels, ["a", "b", "c"], held=torch.arange(3000.0)[:, None]).held[:, 0]
    assert (len(many), many[0], many[-1]) == (1001, 0, 2999)
    with pytest.raises(EtfZooError, match="another model"):
        read_memory(tmp_path, list("abdce"))
    (tmp_path / "memory.safetensors").write_bytes(b"x")
    with pytest.raises(EtfZooError, match="cannot be read"):
        read_memory(tmp_path, list("abcde"))
    with pytest.raises(EtfZooError, match="--base"):
        read_memory(tmp_path / "none", list("abcd"))
    with pytest.raises(EtfZooError, match="No image of d"):
        Memory.of(features, labels, ["a", "b", "c", "d"])


def test_reserve_of_a_fine_tuning():
    recipe = Finetune(model="test_resnet_etf", pretrained=False, reserve=4)
    assert recipe.model_args == {"neck": "mlp", "reserve": 4}
    assert Finetune(
        model="test_resnet_etf", pretrained=False, reserve=4, model_args={"neck": "residual"}
    ).model_args == {
        "neck": "residual",
        "reserve": 4,
    }
    for args in ({"head": "learned"}, {"head": "warm"}, {"method": "ncm"}):
        with pytest.raises(EtfZooError, match="--reserve takes"):
            Finetune(model="test_resnet_etf", pretrained=False, reserve=4, **args)


@pytest.fixture
def with_room(tmp_path):
    """A saved model of two classes with room for three, and folders of images: base, new, test."""
    torch.manual_seed(0)
    model = attach_frame(timm.create_model("test_resnet"), 2, reserve=3, neck="mlp").eval()
    cfg = {"input_size": (3, 32, 32), "license": "apache-2.0"}
    save_folder(model, tmp_path / "model", pretrained_cfg=cfg, label_names=["a", "b"])
    for name, classes in {"base": "ab", "new": "cd", "test": "abcd", "more": "efg"}.items():
        write_folder(
            tmp_path / name, {"": {c: range(20 * i, 20 * i + 3) for i, c in enumerate("abcdefg") if c in classes}}
        )
    return tmp_path


def added(capsys, *arguments, status=0):
    assert main(["add-classes", *map(str, arguments)]) == status
    return capsys.readouterr()


def test_add_classes_from_the_command_line(capsys, with_room):
    model, base, new, out = (with_room / n for n in ("model", "base", "new", "out"))
    assert "--base FOLDER" in added(capsys, model, new, "--output", out, status=1).err
    assert not out.exists()
    text = added(capsys, model, new, "--output", out, "--base", base, "--test", with_room / "test", "--steps", 40).out
    assert "2 classes added from 6 images; room for 1 more" in text
    assert "classes that were there" in text
    before, after = load_model(str(model)), load_model(str(out))
    assert after.pretrained_cfg["label_names"] == list("abcd")
    frozen = {k: v for k, v in before.state_dict().items() if not k.startswith("fc.neck.")}
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in frozen.items())  # backbone, frame and scale
    assert len(read_memory(out, list("abcd")).means) == 4
    assert "No thresholds for etf-zoo predict --reject" in text
    card = (out / "README.md").read_text()
    assert "Then 2 classes were added from 6 images: c, d." in card
    assert "Nothing was trained" not in card
    assert "No threshold of familiarity was fitted" in card
    shown = json.loads(
        added(capsys, out, with_room / "more" / "e", "--output", with_room / "x", "--json", status=1).out or "null"
    )
    assert shown is None  # a folder of images has no classes
    error = added(capsys, out, with_room / "more", "--output", with_room / "x", status=1).err
    assert "no room for 3 more classes: the frame has 4, and 1 in reserve" in error
    assert "'c' is there already" in added(capsys, out, new, "--output", with_room / "x", status=1).err
    assert "holds a model already" in added(capsys, out, new, "--output", out, status=1).err
    (with_room / "empty").mkdir()
    added(capsys, out, with_room / "empty", "--output", with_room / "x", status=1)
    assert not (with_room / "x").exists()
