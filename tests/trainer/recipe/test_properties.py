"""Whatever a recipe or a hierarchy holds, there are two outcomes: it works, or there is one `EtfZooError`."""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import etf_zoo  # noqa: F401  registers the twins
from etf_zoo.errors import EtfZooError
from etf_zoo.frames import Hierarchy, hierarchy_frame
from etf_zoo.trainer.data.augment import augment
from etf_zoo.trainer.recipe.config import Recipe, final_size, save_recipe, size_at
from etf_zoo.trainer.recipe.fields import field_hints
from etf_zoo.trainer.recipe.parsing import parse, read_arguments
from etf_zoo.trainer.run.model import make_model, make_optimizer
from etf_zoo.trainer.run.stepper import Stepper

ROOT = Path(__file__).parents[3]
SHORT = """\
output: runs/x
model: resnet18_etf
model_args: {logit_scale: 30.0, orientation: blocks}
data: {source: digits, size: 32, resident: auto}
augment:
  crop_scale: [0.35, 1.0]
  randaug_ops: 2
  mixup: 0.2
optim: &o {name: sgd, lr: 0.4, weight_decay: 3.0e-4}
ema: {decay: 0.998}
sizes: [[0, 48], [30, 64]]
precision: bf16
time_budget: 9m
tag: e60_tiny
"""
CARDS = sorted((ROOT / "model_cards").glob("*/recipe.yaml"))
BASE = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
QUICK = settings(max_examples=200, derandomize=True, **BASE)
THOROUGH = settings(max_examples=2000, **BASE)

GROUPS = [name for name, hint in field_hints(Recipe).items() if dataclasses.is_dataclass(hint)]
NAMES = [name for name in field_hints(Recipe) if name not in GROUPS] + [
    f"{group}.{name}" for group in GROUPS for name in field_hints(field_hints(Recipe)[group])
]
SPECIAL = [
    *([[0, 0]], [[0, 64], [9, 32], [5, 48]], [[1, 64]], [[0]], [], [0.9], [0.9, 0.99], [0.5, 1.0], {1: 2}, {"a": None}),
    *(
        {"num_classes": 3},
        {"frame": "simplex"},
        {"feature_length": "x"},
        {"feature_length": 10},
        -5,
        -1,
        1.5,
        -0.2,
        0.5,
    ),
    *("nope", "sgd", "muon", "adan", "lookahead_adam", "adahessian", "fusedadam", "9m", "squared", "dot_regression"),
    *("auto", "bf16", "no", "a\0b", "\x1b[2J", 10**30, 2**32, 1e300, 1e-310, True, None, "", "x" * 600),
]
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(SPECIAL))
ANYTHING = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), x, max_size=3)
)
NEAR = st.sampled_from([0, 1, 2, 0.0, 0.1, 0.5, 1.0, 3.5, "", "cross_entropy", True, False, [], {}])
CHANGES = st.dictionaries(st.sampled_from([*NAMES, *GROUPS]), st.one_of(ANYTHING, NEAR, st.sampled_from(SPECIAL)),
                          min_size=1, max_size=3)  # fmt: skip


@functools.cache
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet_etf", num_classes=5)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gives, or the message of its error, of the one kind that is allowed."""
    try:
        return call(), ""
    except EtfZooError as error:
        message = str(error)
    assert 0 < len(message) < 2500
    return None, message


def train_a_step(recipe: Recipe) -> None:
    """What a run does with a recipe, once, on four small images."""
    assert size_at(recipe, 0) > 0
    assert final_size(recipe) > 0
    model, labels = copy.deepcopy(net()), torch.arange(4)
    recipe = dataclasses.replace(recipe, compile=False, channels_last=False)
    accelerator = Accelerator(cpu=True)
    optimizer: Any = make_optimizer(recipe.optim, model)
    stepper = Stepper(recipe, accelerator, model, optimizer, steps_per_epoch=2, class_counts=[3, 4, 5, 6, 7])
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    images = augment(images, recipe.augment, 32, torch.Generator().manual_seed(recipe.seed))
    stepper.step(0, images, labels)


def read_or_refuse(text: str | bytes, file: Path) -> str:
    """The message, if a recipe is refused; empty if it is read, and a step works or is refused in its turn."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    recipe, message = attempt(lambda: read_arguments(Recipe, ["--config", str(file)]))
    if recipe is not None:
        save_recipe(recipe, file)
        assert read_arguments(Recipe, ["--config", str(file)]) == recipe
        attempt(lambda: train_a_step(recipe))
    return message


def check_changes(changes: dict[str, Any], file: Path) -> None:
    entries: dict[str, Any] = {}
    for name, value in sorted(changes.items()):
        group, _, inner = name.rpartition(".")
        if not group:
            entries[name] = value
        elif isinstance(entries.setdefault(group, {}), dict):
            entries[group] = {**entries[group], inner: value}
    try:
        text = yaml.safe_dump(entries)
    except (yaml.YAMLError, UnicodeEncodeError):  # lone surrogates
        return
    message = read_or_refuse(text, file)
    named = {part for name in changes for part in (name.partition(".")[0], name.rpartition(".")[2])}
    assert not message or "not YAML" in message or any(name in message for name in named), message


def check_text(edits: list[tuple[int, str]], text: str, file: Path) -> None:
    for place, new in edits:
        start = place % len(text)
        text = text[:start] + new + text[start + len(new) % 3 :]
    read_or_refuse(text, file)


EDITS = st.lists(
    st.tuples(
        st.integers(0, 10_000),
        st.text(alphabet="\n :-[]{},&*!<|>'\"#%@0123456789.eE~\t\0\x1bé", max_size=6) | st.text(max_size=3),
    ),
    min_size=1,
    max_size=4,
)


@QUICK
@given(CHANGES)
def test_a_changed_recipe_runs_or_is_refused(file, changes):
    check_changes(changes, file)


@QUICK
@given(EDITS)
def test_a_damaged_recipe_runs_or_is_refused(file, edits):
    check_text(edits, SHORT, file)


@pytest.mark.slow
@THOROUGH
@given(CHANGES)
def test_many_changed_recipes(file, changes):
    check_changes(changes, file)


@pytest.mark.slow
@THOROUGH
@given(EDITS, st.sampled_from(CARDS))
def test_many_damaged_recipes(file, edits, card):
    check_text(edits, card.read_text(), file)


@pytest.mark.parametrize("card", CARDS, ids=lambda p: p.parent.name)
def test_committed_recipes_are_read(card):
    assert read_arguments(Recipe, ["--config", str(card)]).tag


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: null", ["data takes fields and values", "null"]),
        ("data: []", ["data takes fields and values", "[]"]),
        ("augment: &a [*a]", ["holds itself", "line 1"]),
        ("model_args: &a {b: *a}", ["holds itself"]),
        ("sizes: [[0,0]]", ["sizes", "[[0, 0]]", "[first epoch, pixels]", "pixels in [1, 10000]"]),
        ("sizes: [[0, 64], [9, 32], [5, 48]]", ["sizes", "epochs rising"]),
        ("eval_size: -5", ["eval_size", "-5", "in [0, 10000]"]),
        ("seed: -1", ["seed", "-1", "in [0, 4294967295]"]),
        ("optim: {name: nope}", ["optim.name", "nope", "adamw"]),
        ("optim: {betas: [0.9]}", ["optim.betas", "2 numbers", "[0.9]"]),
        ("optim: {name: sgd, betas: [0.9, 0.99]}", ["optim.betas takes no numbers for sgd"]),
        ("optim: {name: adahessian}", ["optim.name", "first order"]),
        ("optim: {weight_decay: -5}", ["optim.weight_decay", "-5", "in [0, 1000]"]),
        ("optim: {clip_grad: -1}", ["optim.clip_grad", "-1", "0 for none"]),
        ("optim: {lr: .inf}", ["optim.lr", "inf"]),
        ("label_smoothing: 1.5", ["label_smoothing", "1.5", "in [0, 1)"]),
        ("label_smoothing: .nan", ["label_smoothing", "nan", "in [0, 1)"]),
        ("label_smoothing: -0.2", ["label_smoothing", "-0.2"]),
        ("augment: {mixup: .nan}", ["augment.mixup", "nan"]),
        ("model_args: {num_classes: 3}", ["model_args", "num_classes", "3"]),
        ("model_args: {checkpoint_path: x}", ["model_args", "names other weights"]),
        ("model_args: {1: 2}", ["model_args", "texts as keys", "1"]),
        ("model_args: {logit_scale: .inf}", ["model_args.logit_scale", "finite", "inf"]),
        ("epochs: 3\nseed: 1\nepochs: 4", ["'epochs' comes twice", "line 3"]),
        ("optim: {lr: 1, lr: 2}", ["'lr' comes twice"]),
        ("epochs: true", ["epochs", "whole number", "True"]),
        ("epochs: 3.0", ["epochs", "whole number", "3.0"]),
        ("tag: 123", ["tag", "letters", "123"]),
        ("tag: ../x", ["tag", "letters", "../x"]),
        ("output: ''", ["output", "a text of 1 to 500 characters"]),
        ('notes: "\\e[2J"', ["notes", "cannot be printed"]),
        ("loss: {name: nope}", ["loss.name", "nope", "dot_regression"]),
        ("loss: {name: squared, args: {nope: 1}}", ["loss.args of squared", "nope"]),
        ("loss: {penalty_args: {nope: 1}}", ["loss.penalty_args", "nope"]),
        ("precision: fp8", ["precision", "fp8", "fp32, bf16, fp16"]),
        ("time_budget: soon", ["time_budget", "soon", "such as 9m"]),
        ("seed: 0x" + "f" * 5000, ["seed", "thousands of digits"]),
        ("model_args: " + "[" * 3000, ["nested too deeply"]),
        ("model_args: {a: " + "[" * 30 + "]" * 30 + "}", ["model_args.a is nested more than 20 deep"]),
        ("epochs: !!int x", ["not YAML"]),
        ("epochs: !!python/object:os.system x", ["not YAML"]),
        ("1: 2", ["Names of fields are texts, got 1"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
    ],
)
def test_the_message_names_field_value_and_what_is_allowed(text, words, file, capsys):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match="2"):
        parse(Recipe, ["--config", str(file)])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--sizes", "&a [*a]"], ["--sizes", "holds itself"]),
        (["--model_args", "{1: 2}"], ["model_args", "texts as keys"]),
        (["--model_args.num_classes", "3"], ["model_args", "num_classes"]),
        (["--optim", "nowhere.yaml"], ["optim takes fields and values"]),
        (["--epochs"], ["--epochs takes a value"]),
        (["epochs", "3"], ["'epochs' belongs to no option"]),
        (["--optim.lr=-1"], ["optim.lr", "-1"]),
    ],
)
def test_the_command_line_is_checked_alike(args, words):
    with pytest.raises(EtfZooError) as caught:
        read_arguments(Recipe, args)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "args",
    [
        {"nope": 1},
        {"act_layer": 3},
        {"frame": 3},
        {"frame": "nope"},
        {"logit_scale": [1]},
        {"whitening": 5},
        {"moving": "x"},
    ],
)
def test_a_model_that_cannot_be_made_is_one_error(args):
    recipe = Recipe(model="test_resnet_etf", model_args=args)
    with pytest.raises(EtfZooError):
        make_model(recipe, 5)


# --------------------------------------------------------------------------------------------------- hierarchies

NODES = st.text(max_size=3) | st.sampled_from(["root", "a", "b", "c"])


@st.composite
def trees(draw) -> dict[str, Any]:
    """A tree, mostly; some entries changed to anything."""
    count = draw(st.integers(1, 12))
    parents: dict[str, Any] = {f"n{i}": f"n{draw(st.integers(0, i - 1))}" for i in range(1, count + 1)}
    for name, value in draw(st.dictionaries(NODES, NODES | ANYTHING, max_size=1)).items():
        parents[name] = value
    return parents


CONTENT = st.one_of(trees(), trees(), st.dictionaries(NODES, NODES, max_size=6), ANYTHING)


def check_hierarchy(content: Any, names: Any, gamma: float, file: Path) -> None:
    try:
        file.write_text(json.dumps(content))
    except (TypeError, UnicodeEncodeError):
        return
    read = [attempt(lambda: Hierarchy.from_json(file))[0], attempt(lambda: Hierarchy(content))[0]]
    for tree in filter(None, read):
        frame, _ = attempt(lambda tree=tree: hierarchy_frame(tree.distances(tree.leaves), 16, gamma=gamma))
        if frame is not None:
            torch.testing.assert_close(frame.norm(dim=1), torch.ones(len(frame)))
        distances, _ = attempt(lambda tree=tree: tree.distances(names))
        assert distances is None or distances.shape == (len(names), len(names))


@QUICK
@given(CONTENT, st.lists(NODES | LEAVES, max_size=3), st.floats() | st.sampled_from([0.1, 2.0]))
def test_a_hierarchy_has_a_frame_or_is_refused(file, content, names, gamma):
    check_hierarchy(content, names, gamma, file)


@pytest.mark.slow
@THOROUGH
@given(CONTENT, st.lists(NODES | LEAVES, max_size=3), st.floats() | st.sampled_from([0.1, 2.0]))
def test_many_hierarchies(file, content, names, gamma):
    check_hierarchy(content, names, gamma, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": ["b"]}', "maps a child's name"),
        ('{"a": null}', "maps a child's name"),
        ("[1]", "holds a list"),
        ("NaN", "holds a float"),
    ],
)
def test_wrong_hierarchies(text, message, file):
    file.write_text(text)
    with pytest.raises(EtfZooError, match=message):
        Hierarchy.from_json(file)


def test_a_deep_chain_is_a_tree():
    tree = Hierarchy({f"n{i + 1}": f"n{i}" for i in range(20_000)} | {"leaf": "n0"})
    assert tree.distances(tree.leaves).max() == 20_000


def test_wrong_types_of_hierarchies(tmp_path):
    with pytest.raises(EtfZooError, match="a mapping"):
        Hierarchy([("a", "b")])  # type: ignore[arg-type]  # what is tested
    with pytest.raises(EtfZooError, match="named by texts, got 3"):
        Hierarchy({"a": "r", "b": "r"}).distances([3])  # type: ignore[list-item]  # what is tested
    with pytest.raises(EtfZooError, match="named by texts"):
        Hierarchy({"a": "r", "b": "r"}).distances([["a"]])  # type: ignore[list-item]  # what is tested
    with pytest.raises(EtfZooError, match="Cannot read the hierarchy"):
        Hierarchy.from_json(tmp_path / "missing.json")
