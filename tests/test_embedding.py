"""Embeddings in the frame's coordinates: the same for every model of a frame; an index refuses another one."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import etf_zoo
from etf_zoo.embedding import Index, Space, embed, frame_coordinates, read_index, space_of, write_index
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import random_frame, simplex_etf
from etf_zoo.frames.simplex import helmert_basis
from etf_zoo.sharing.folder import save_folder
from etf_zoo_cli import main
from tests.made_data import picture


def test_coordinates_are_those_of_the_matrices():
    x, frame = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), simplex_etf(7, 9)
    slow = torch.stack([helmert_basis(7).T @ (frame.double() @ row.double()) for row in x])
    slow = torch.stack([row / row.norm() for row in slow]).float()
    torch.testing.assert_close(frame_coordinates(x, frame), slow)
    torch.testing.assert_close(frame_coordinates(3 * x, frame), slow)


@pytest.mark.parametrize(("dim", "orientation", "seed"), [(9, "random", 3), (30, "blocks", 0), (6, "random", 1)])
def test_width_and_turn_of_the_frame_do_not_matter(dim, orientation, seed):
    one, other = simplex_etf(7, 12, seed=0), simplex_etf(7, dim, orientation=orientation, seed=seed)
    weights = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))  # the same mixtures of the prototypes
    torch.testing.assert_close(
        frame_coordinates(weights @ one, one), frame_coordinates(weights @ other, other), atol=2e-6, rtol=1e-5
    )
    prototypes = frame_coordinates(other, other)
    torch.testing.assert_close(prototypes @ prototypes.T, other @ other.T, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050_etf", "test_resnet_etf", "test_vit_etf"])
def test_embeddings_of_a_model_are_its_logits_seen_by_helmert(name):
    model = timm.create_model(name, num_classes=6).eval()
    images = torch.randn(3, *timm.models.get_model_input_config(model)["input_size"])
    found = etf_zoo.embed(model, images)
    with torch.no_grad():
        logits = model(images).double()
    wanted = nn.functional.normalize(logits @ helmert_basis(6), dim=1).float()
    assert found.shape == (3, 5)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_spaces_agree_for_frames_that_do():
    def space(**args):
        return space_of(timm.create_model("test_resnet_etf", num_classes=6, **args).eval())

    ours = space(seed=0)
    ours.check(space(seed=5, orientation="random"))
    ours.check(space_of(timm.create_model("test_vit_etf", num_classes=6).eval()))
    with pytest.raises(EtfZooError, match="another frame"):
        ours.check(space(frame="random"))
    with pytest.raises(EtfZooError, match="another frame"):
        space(frame="random").check(space(frame="random", seed=1))
    space(frame="random").check(space(frame="random"))
    with pytest.raises(EtfZooError, match="another frame"):
        ours.check(space_of(timm.create_model("test_resnet_etf", num_classes=7).eval()))
    Space("x", ["a", "b"]).check(Space("x", ["a", "b", "c"]))  # added since
    with pytest.raises(EtfZooError, match="other classes"):
        Space("x", ["a", "b"]).check(Space("x", ["b", "a"]))


def test_models_without_one_embedding_are_refused():
    images = torch.randn(1, 3, 32, 32)
    cases = [
        (timm.create_model("resnet10t", num_classes=3).eval(), "has none"),
        (timm.create_model("test_resnet_etf", num_classes=3).train(), "model.eval"),
        (timm.create_model("deit_tiny_distilled_patch16_224_etf", num_classes=3).eval(), "has 2"),
    ]
    for model, words in cases:
        with pytest.raises(EtfZooError, match=words):
            embed(model, images)
    with pytest.raises(EtfZooError, match="do not fit"):
        frame_coordinates(torch.randn(2, 5), random_frame(3, 4))


def test_an_index_is_searched_as_a_loop_would(tmp_path):
    rows = nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    write_index(Index(rows, [f"{i}.jpg" for i in range(9)], Space("f", ["a"]), "m"), tmp_path / "i.safetensors")
    index = read_index(tmp_path / "i.safetensors")
    assert (index.space, index.model, index.images[3]) == (Space("f", ["a"]), "m", "3.jpg")
    cosines, found = index.search(rows[2:3] + 0, top=50)
    slow = sorted(((float(rows[2] @ row), i) for i, row in enumerate(rows)), reverse=True)
    assert found[0].tolist() == [i for _, i in slow]
    torch.testing.assert_close(cosines[0], torch.tensor([c for c, _ in slow]))


def test_a_damaged_or_foreign_file_is_one_error(tmp_path):
    file = tmp_path / "i.safetensors"
    with pytest.raises(EtfZooError, match="There is no index"):
        read_index(file)
    file.write_bytes(b"nothing")
    with pytest.raises(EtfZooError, match="cannot be read"):
        read_index(file)
    save_file({"embeddings": torch.eye(2)}, file)
    with pytest.raises(EtfZooError, match="no index of"):
        read_index(file)
    write_index(Index(torch.eye(3), ["a", "b"], Space("f")), file)
    with pytest.raises(EtfZooError, match="2 names"):
        read_index(file)
    with pytest.raises(EtfZooError, match="no image"):
        write_index(Index(torch.zeros(0, 3), [], Space("f")), file)
    with pytest.raises(EtfZooError, match="cannot be written"):
        write_index(Index(torch.eye(3), ["a"], Space("f")), tmp_path / "none" / "i.safetensors")


def run(capsys, *arguments, status=0):
    assert main([*map(str, arguments)]) == status
    return capsys.readouterr()


def test_embed_and_search_from_the_command_line(capsys, folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        picture(40 * i).save(photos / f"{i}.png")
    (photos / "bad.png").write_bytes(b"x")
    index = tmp_path / "index.safetensors"
    shown = run(capsys, "embed", photos, "--model", folder, "--output", index, status=1)
    assert "4 images" in shown.out
    assert "bad.png cannot be read" in shown.err
    text = run(capsys, "search", photos / "2.png", "--index", index, "--model", folder, "--top", 2).out.splitlines()
    assert text[1].split() == ["1.000", str(photos / "2.png")]
    assert len(text) == 3
    found = json.loads(run(capsys, "search", photos / "1.png", "--index", index, "--json").out)
    assert found[0]["found"][0]["image"] == str(photos / "1.png")

    torch.manual_seed(1)
    cfg = {"input_size": (3, 32, 32)}
    wider = timm.create_model("test_resnet_etf", num_classes=5, seed=4, orientation="random").eval()
    save_folder(wider, tmp_path / "wider", pretrained_cfg=cfg, label_names=list("abcde"))
    run(capsys, "search", photos / "1.png", "--index", index, "--model", tmp_path / "wider")
    save_folder(wider, tmp_path / "other", pretrained_cfg=cfg, label_names=list("abcdx"))
    error = run(capsys, "search", photos / "1.png", "--index", index, "--model", tmp_path / "other", status=1).err
    assert "'e' has the place of 'x'" in error
    (tmp_path / "empty").mkdir()
    error = run(capsys, "embed", tmp_path / "empty", "--model", folder, "--output", index, status=1).err
    assert "no image that can be read" in error
