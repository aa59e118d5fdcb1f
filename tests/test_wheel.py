"""What pip installs: the library and its weights, nothing of training, found from a wheel and from a clone."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from etf_zoo.weights.native import cards_folder, native_tags

ROOT = Path(__file__).parents[1]
LOAD = """
import sys, timm, etf_zoo
assert etf_zoo.__file__.startswith(sys.argv[1]), etf_zoo.__file__
for name in etf_zoo.weights.native.native_tags():
    print(name, timm.create_model(name, pretrained=True).num_classes)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_library_and_weights_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"etf_zoo", "etf_zoo_cli.py", next(t for t in tops if t.endswith(".dist-info"))}
    cards = {name.split("/")[2] for name in names if name.startswith("etf_zoo/model_cards/")}
    assert cards == set(native_tags())
    for name in cards:
        assert f"etf_zoo/model_cards/{name}/model.safetensors" in names
        assert f"etf_zoo/model_cards/{name}/config.json" in names
    assert not [name for name in names if name.endswith((".png", ".jsonl"))]
    assert "etf_zoo/sharing/card_template.md" in names
    assert wheel.stat().st_size <= 95e6


def test_installed_wheel_finds_its_weights_offline(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
    )
    assert [line.split()[0] for line in out.stdout.splitlines()] == sorted(native_tags())


def test_a_clone_finds_its_weights():
    assert cards_folder() in (ROOT / "model_cards", ROOT / "etf_zoo" / "model_cards")
    assert native_tags()


@pytest.mark.parametrize(
    ("target", "version", "expected"),
    [
        (
            "wheel",
            "standard",
            ["etf_zoo/model_cards/a_etf.x/config.json", "etf_zoo/model_cards/a_etf.x/model.safetensors"],
        ),
        ("sdist", "standard", ["model_cards/a_etf.x/config.json", "model_cards/a_etf.x/curve.png"]),
        ("wheel", "editable", []),
    ],
)
def test_a_model_is_embedded_by_its_folder(tmp_path, target, version, expected):
    folders = {
        "a_etf.x": ["config.json", "model.safetensors", "curve.png", "metrics.jsonl"],
        "b_etf.x": ["config.json", "hub.json"],  # published: the wheel knows its tag
        "c_etf.x": ["config.json"],  # weights not kept
        "a_control.x": ["config.json", "model.safetensors"],
    }
    for folder, names in folders.items():
        (tmp_path / "model_cards" / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / "model_cards" / folder / name).touch()
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    hook = module.EmbeddedModels(str(tmp_path), {}, None, None, str(tmp_path), target)
    build_data = {"force_include": {}}
    hook.initialize(version, build_data)
    held = sorted(build_data["force_include"].values())
    assert held[: len(expected)] == expected
    assert {Path(path).parent.name for path in held} == (set() if version == "editable" else {"a_etf.x", "b_etf.x"})
