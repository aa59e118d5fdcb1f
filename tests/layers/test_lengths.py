"""Lengths of prototypes: they multiply logits, stay in float32, and go where their frame goes."""

import pytest
import safetensors.torch
import timm
import torch

from etf_zoo import FrameClassifier, attach_frame
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import imbalanced_frame, simplex_etf
from etf_zoo.losses import FrameCrossEntropy
from etf_zoo.sharing.card import render_card
from etf_zoo.sharing.folder import save_folder
from etf_zoo.sharing.plain import fold_head
from etf_zoo_cli import main

LENGTHS = torch.tensor([3.0, 2.0, 0.5])


def head(**kwargs):
    return FrameClassifier(8, 3, **{"lengths": LENGTHS, "feature_norm": "none", **kwargs})


def test_logits_are_products_with_rows_of_these_lengths():
    x, classifier = torch.randn(4, 8), head(logit_scale=2.0)
    rows = torch.stack([length * row for length, row in zip(LENGTHS, classifier.weight, strict=True)])
    assert torch.allclose(classifier(x), 2 * x @ rows.T, atol=1e-6)
    assert torch.allclose(classifier.weight.norm(dim=1), torch.ones(3))  # unit directions stay the rule
    values, classes = classifier.top_k(x, 3)
    assert torch.allclose(values, classifier(x).sort(dim=1, descending=True).values, atol=1e-5)
    assert torch.equal(classes, classifier(x).argsort(dim=1, descending=True))
    assert torch.allclose(fold_head(classifier)(x), classifier(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_scripting():
    x, classifier = torch.randn(3, 8), head()
    assert torch.equal(torch.jit.script(classifier)(x), classifier(x))


def test_a_closed_form_classifier_is_a_frame_with_lengths():
    w, h = imbalanced_frame([100, 10, 5], 8, weight_decay=1e-3, feature_decay=1e-4)
    frame = torch.nn.functional.normalize(w, dim=1)
    classifier = FrameClassifier(8, 3, frame=frame, lengths=w.norm(dim=1), feature_norm="none")
    assert torch.allclose(classifier(h), h @ w.T, atol=1e-5)


def test_without_lengths_nothing_changes():
    classifier = FrameClassifier(8, 3)
    assert "lengths" not in classifier.state_dict()
    assert not classifier.has_lengths


def test_float32_stays_and_reset_brings_them_back():
    classifier = head().half()
    assert classifier.lengths.dtype == torch.float32
    assert torch.equal(classifier.lengths, LENGTHS)
    with torch.no_grad():
        classifier.lengths.fill_(7)
    classifier.reset_parameters()
    assert torch.equal(classifier.lengths, LENGTHS)
    empty = head(device="meta").to_empty(device="cpu").train()
    assert torch.equal(empty.lengths, LENGTHS)


def test_they_are_loaded_with_their_frame_only():
    source, target = head(seed=1), head(lengths=torch.ones(3))
    state = source.state_dict()
    missing, _ = target.load_state_dict({k: v for k, v in state.items() if k != "weight"}, strict=False)
    assert set(missing) == {"weight", "lengths", "logit_scale"}
    assert torch.equal(target.lengths, torch.ones(3))
    target.load_state_dict(state)
    assert torch.equal(target.lengths, LENGTHS)
    with pytest.raises(RuntimeError, match="one positive number for each of the 3 classes"):
        target.load_state_dict({**state, "lengths": torch.tensor([1.0, -1.0, 2.0])})
    with pytest.raises(RuntimeError, match="lengths"):
        FrameClassifier(8, 3).load_state_dict(state)


def test_a_model_folder_brings_them(tmp_path):
    model = attach_frame(timm.create_model("test_resnet"), 3, frame="simplex", lengths=LENGTHS).eval()
    save_folder(model, tmp_path, label_names=list("abc"))  # in float16
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert stored["fc.lengths"].dtype == torch.float32
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again.fc.lengths, LENGTHS)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(again(images), model(images), atol=1e-2)
    fresh = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4)
    assert not fresh.fc.has_lengths
    with pytest.raises(EtfZooError, match="lengths would contradict"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, lengths=torch.ones(3))


def test_reset_classifier_keeps_them_for_their_number_of_classes():
    model = attach_frame(timm.create_model("test_resnet"), 3, frame=simplex_etf(3, 96), lengths=LENGTHS)
    model.reset_classifier(3)
    assert torch.equal(model.fc.lengths, LENGTHS)
    model.reset_classifier(4)
    assert not model.fc.has_lengths
    assert model.fc.weight.shape[0] == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": torch.ones(4)}, "one positive number for each of the 3"),
        ({"lengths": torch.tensor([1.0, 0.0, 1.0])}, "zero row"),
        ({"lengths": True}, "are a tensor"),
        ({"lengths": 2.0}, "are a tensor"),
        ({"reserve": 2}, "leave reserve out"),
    ],
)
def test_errors(change, words):
    with pytest.raises(EtfZooError, match=words):
        head(**change)


def test_blocks_of_classes_know_none():
    with pytest.raises(EtfZooError, match="unit rows"):
        FrameCrossEntropy(head())


def test_info_and_card_tell_of_them(tmp_path, capsys):
    model = attach_frame(timm.create_model("test_resnet"), 3, frame="simplex", lengths=LENGTHS)
    save_folder(model, tmp_path, label_names=list("abc"), pretrained_cfg={"license": "apache-2.0"})
    assert main(["info", str(tmp_path)]) == 0
    assert "0.5 to 3" in capsys.readouterr().out
    (tmp_path / "metrics.json").write_text("{}")
    assert "whose prototypes have stored lengths" in render_card(tmp_path)
