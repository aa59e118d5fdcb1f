"""Which pretraining with a fixed frame transfers better than one with a learned head? Candidates beside both controls.

    python training/experiments/better_transfer.py --stage 1
    python training/experiments/better_transfer.py --stage 1 --epochs 12 --rates --only learned "frame, MLP, entropy"
    python training/experiments/better_transfer.py --stage 2 --only learned "learned cosine" "frame, MLP, entropy"
    python training/experiments/better_transfer.py --stage 3 --only learned "learned cosine" "frame, MLP, entropy"
    python training/experiments/better_transfer.py --stage 2 --finished
    python training/experiments/better_transfer.py

Stage 1 is a short run of ResNet-18 on an eighth of Tiny ImageNet; stage 2 the zoo's recipe of 23 epochs, one seed;
stage 3 the same, three seeds, measured on test images. Stages 1 and 2 judge by held-out training images of the transfer
sets, and the source's accuracy is that of training images that no run trains on. Test images are opened in stage 3
only. `--epochs` and `--images` make a budget of their own, with tables of its own: twice the epochs of stage 1 tell
whether a difference grows or shrinks. `--finished` trains nothing: it scores weights of the zoo, which
`training/experiments/zoo.py` trained by the recipe of stage 2 on all images of the source.

The two controls and the frame try each of `--rates`, plain and behind an MLP. The best rate, by the mean score of seed
0, is then that of all other candidates with this kind of head, with or without a neck; stage 3 takes what stage 2
chose, if there is no stage 2 what stage 1 chose, and tunes each backbone at the rate that was best for its kind in
stage 2. Each finished cell is a line of `cells.jsonl`, one that diverged too, and what is there is not run again: start
the command again after a stop. Without a stage the tables are written.

A GPU for 15 minutes is enough for one of the later stages, by an estimate that nobody has tested: 17,500 steps at the
21 ms that ResNet-18 took in `training/results/zoo_gpu` are 6 minutes, and scoring takes one or two. Bring the data sets
in the folder that ETF_ZOO_DATA names: encoded, 200 MB (of Tiny ImageNet the training files are enough), which are
decoded once, by as many processes as there are cores; or as arrays, 1.3 GB and ready, by `python training/prepare.py
--data.source tiny_imagenet --data.size 64 --out DATA/tiny_imagenet`, the three others with `--data.size 96`. Then

    nvidia-cuda-mps-control -d
    timeout 540 python training/experiments/better_transfer.py --stage 2 --rates --jobs 6 \
        --only learned "frame, MLP, entropy, two depths" "learned, entropy, two depths" "learned cosine" \
        "learned cosine, MLP, entropy, two depths" frame

trains six at a time: a ResNet-18 leaves most of a large GPU idle, under MPS kernels of several processes run at once,
and each process wants two or three cores. `--rates` without any takes those that stage 1 chose, each head its own:
three runs less, and no candidate waits for the controls. The order is by what stage 1 says: the better control, the
best candidate and the learned head with the same additions, which tells whether a frame has any part in it, as do
learned cosine rows behind the same MLP; then the rest. `timeout` ends all with a signal at which they save; the same
command goes on, each run from where it was. Another 15 minutes are for nine runs that judge: `--stage 3 --jobs 9
--only` and the first three names above, and once more for "learned cosine". `--results` says where lines and tables go,
`--work` where checkpoints, locks and the weights of stage 3 do (45 MB each); copy both back to go on elsewhere. A try
that a CPU does in two minutes: `--stage 1 --images 256 --epochs 1 --sets flowers17 --results /tmp/try --work
/tmp/try/work --only learned --rates 0.1`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from etf_zoo.errors import DivergedError, EtfZooError
from etf_zoo.models.find import load_model, model_folder
from etf_zoo.trainer.data.batches import limited, load_split
from etf_zoo.trainer.data.sealed import choosing
from etf_zoo.trainer.data.teacher import taught
from etf_zoo.trainer.recipe.config import Recipe, parse
from etf_zoo.trainer.recipe.parsing import merged, parse_entries
from etf_zoo.trainer.run import checkpoint
from etf_zoo.trainer.run.checkpoint import CHECKPOINTS
from etf_zoo.trainer.run.run import Run
from etf_zoo.trainer.run.script import run_script
from etf_zoo.weights.native import WEIGHTS_NAME
from training.experiments.better_transfer_table import mean_score, write_tables
from training.experiments.grid import CELLS, Results, raise_failed, run_grid, settings_digest, weights_digest
from training.experiments.transfer_score import SETS, Scoring, images_of, score

RESULTS = Path("training/results/better_transfer")
WORK = Path("runs/better_transfer")
UNTRAINED = 2500  # training images of the source that no run trains on, the same for all

SOURCE: dict[str, Any] = {
    "model": "resnet18_etf",
    "data": {"source": "tiny_imagenet", "val_split": "validation", "size": 64},
    "augment": {"crop_scale": [0.35, 1.0]},
    "optim": {"name": "sgd", "weight_decay": 2e-4, "warmup_epochs": 1},
    "batch_size": 128,
    "label_smoothing": 0.1,
    "precision": "bf16",
    "tensorboard": False,
}
STAGES: dict[int, dict[str, Any]] = {
    1: {"epochs": 6, "sizes": [[0, 32]], "data": {"limit": 12_500}},
    2: {"epochs": 23, "sizes": [[0, 32], [14, 48], [19, 64]]},
    3: {"epochs": 23, "sizes": [[0, 32], [14, 48], [19, 64]]},
}
SCORING = {
    1: Scoring(images=400, rates=(0.002,)),
    2: Scoring(size=64, epochs=8, images=0, rates=(0.0005, 0.001, 0.002, 0.004), chosen_strength=True),
    3: Scoring(size=64, epochs=12, images=0, rates=(0.001,), chosen_strength=True, test=True),
}
RATES = (0.1, 0.3)
KINDS = {"learned": "learned", "learned_cosine": "learned cosine", "frame": "frame"}  # head -> whose rate it takes

SCALE = {"logit_scale": 30.0}
MLP = {**SCALE, "neck": "mlp"}
BOTH = {"nearest_neighbor_entropy": 0.05, "stage_weight": 0.3}
NONL = {"name": "prototype_contrast", "args": {"own_class": False}}
RANDOM = "random weights"  # scored untrained: what there is without any pretraining
# name -> what a recipe has otherwise; the first six try all rates. What matters most by the literature comes first.
CANDIDATES: dict[str, dict[str, Any]] = {
    "learned": {"head": "learned"},
    "learned cosine": {"head": "learned_cosine", "model_args": SCALE},
    "frame": {"model_args": SCALE},
    "frame, MLP": {"model_args": MLP},
    "learned, MLP": {"head": "learned", "model_args": {"neck": "mlp"}},
    "learned cosine, MLP": {"head": "learned_cosine", "model_args": MLP},
    "frame, MLP, entropy": {"model_args": MLP, "loss": {"nearest_neighbor_entropy": 0.05}},
    "learned, entropy": {"head": "learned", "loss": {"nearest_neighbor_entropy": 0.05}},
    "frame, entropy": {"model_args": SCALE, "loss": {"nearest_neighbor_entropy": 0.05}},
    "frame, two depths": {"model_args": SCALE, "loss": {"stage_weight": 0.3}},
    "frame, multi-crop": {"model_args": SCALE, "augment": {"large_views": 2, "small_views": 4}},
    "frame, MLP, covariance 0.1": {"model_args": MLP, "loss": {"variance_covariance": 0.1}},
    "frame, target cosine 0.6 to 0.15": {"target_cosine": [0.6, 0.15]},
    "frame, target cosine 0.15": {"target_cosine": [0.15]},
    "frame, teacher": {"model_args": SCALE, "label_smoothing": 0.0, "data": {"label": "teacher"}},
    "learned, teacher": {"head": "learned", "label_smoothing": 0.0, "data": {"label": "teacher"}},
    "frame, MLP of 2 layers": {"model_args": {**SCALE, "neck": "mlp2"}},
    "frame, MLP of 3 layers": {"model_args": {**SCALE, "neck": "mlp3"}},
    "frame, MLP, covariance 0.5": {"model_args": MLP, "loss": {"variance_covariance": 0.5}},
    "learned, two depths": {"head": "learned", "loss": {"stage_weight": 0.3}},
    "learned, multi-crop": {"head": "learned", "augment": {"large_views": 2, "small_views": 4}},
    "frame, NONL": {"model_args": SCALE, "loss": NONL},
    "learned cosine, NONL": {"head": "learned_cosine", "model_args": SCALE, "loss": NONL},
    "frame, NTCE": {"model_args": SCALE, "loss": {"name": "prototype_contrast"}},
    "frame, target cosine 0.6": {"target_cosine": [0.6]},
    "frame, target cosine 0.3": {"target_cosine": [0.3]},
    # what stage 1 led to, and its controls: without the MLP, which costs the learned head more than it gives, and with
    "frame, MLP, entropy, two depths": {"model_args": MLP, "loss": BOTH},
    "learned, entropy, two depths": {"head": "learned", "loss": BOTH},
    "learned, MLP, entropy, two depths": {"head": "learned", "model_args": {"neck": "mlp"}, "loss": BOTH},
    "learned cosine, MLP, entropy, two depths": {"head": "learned_cosine", "model_args": MLP, "loss": BOTH},
    # the winner with what else helped a frame in stage 1
    "frame, MLP, entropy, two depths, target cosine 0.6 to 0.15": {
        "model_args": {"neck": "mlp"},
        "loss": BOTH,
        "target_cosine": [0.6, 0.15],
    },
    "frame, MLP, entropy, two depths, target cosine 0.6": {
        "model_args": {"neck": "mlp"},
        "loss": BOTH,
        "target_cosine": [0.6],
    },
    "frame, MLP, entropy, two depths, covariance 0.1": {
        "model_args": MLP,
        "loss": {**BOTH, "variance_covariance": 0.1},
    },
    "frame, MLP, entropy, two depths, covariance 0.5": {
        "model_args": MLP,
        "loss": {**BOTH, "variance_covariance": 0.5},
    },
    "frame, MLP, entropy, two depths, target cosine 0.6 to 0.15, covariance 0.5": {
        "model_args": {"neck": "mlp"},
        "loss": {**BOTH, "variance_covariance": 0.5},
        "target_cosine": [0.6, 0.15],
    },
    "frame, MLP, entropy, two depths, NONL": {"model_args": MLP, "loss": {**BOTH, **NONL}},
    RANDOM: {},
}
# Name -> weights of `training/recipes/zoo_cpu.yaml`; those of the frame are in the repository's history:
# git checkout 8fb60d7 -- model_cards/resnet18_etf.e23s30_tiny
# Those in runs/zoo stay where `training/experiments/zoo.py resnet18_projector_cosine resnet18_projector_annealed` left
# them.
FINISHED = {
    "learned": "model_cards/resnet18_control.e23_tiny",
    "frame": "model_cards/resnet18_etf.e23s30_tiny",
    "frame, MLP, entropy, two depths": "model_cards/resnet18_etf.e23p_tiny",
    "learned cosine, MLP, entropy, two depths": "runs/zoo/resnet18_cosine_control.e23p_tiny/model",
    "frame, MLP, entropy, two depths, target cosine 0.6 to 0.15": "runs/zoo/resnet18_etf.e23pa_tiny/model",
}
TRYING = tuple(CANDIDATES)[:6]  # a neck asks for a rate of its own


@dataclass(frozen=True)
class Cell:
    """One pretraining and its scores."""

    stage: int
    name: str
    seed: int
    recipe: Recipe
    scoring: Scoring
    keep: bool = False
    budget: str = ""  # where it is not the stage's, what it is
    weights: str = ""  # a model that was trained before

    @property
    def key(self) -> str:
        weights = [weights_digest(self.weights)] if self.weights else []
        settings = settings_digest(self.recipe, asdict(self.scoring), UNTRAINED, *weights)
        return f"{self.stage} {self.name} lr{self.recipe.optim.lr:g} seed{self.seed} {settings}"


def recipe_of(stage: int, name: str, rate: float, seed: int, changes: dict[str, Any]) -> Recipe:
    """A candidate's recipe. Views of an image are counted: of several, fewer images go into a step and an epoch."""
    entries = merged(merged(SOURCE, STAGES[stage]), merged(CANDIDATES[name], changes))
    recipe = parse_entries(Recipe, merged(entries, {"optim": {"lr": rate}, "seed": seed}))
    views = recipe.augment.views
    epochs = max(1, round(recipe.epochs / views))
    sizes = [[round(first / views), pixels] for first, pixels in recipe.sizes]
    return replace(
        recipe,
        batch_size=round(recipe.batch_size / views),
        epochs=epochs,
        sizes=sizes,
        eval_every=epochs,
        save_every=1 if stage > 1 else epochs,
        keep_checkpoints=1,
    )


def decode(args: argparse.Namespace) -> None:
    """Have all images decoded and kept before several processes ask for them."""
    load_split(recipe_of(args.stage, "learned", RATES[0], 0, {}).data, "train")
    for name in args.sets:
        images_of(name, SCORING[args.stage])


def measure(work: Path, cell: Cell) -> dict[str, Any]:
    """Train and score; what something is chosen by cannot open any split but that of training."""
    try:
        with nullcontext() if cell.scoring.test else choosing():
            return _measure(work, cell)
    except DivergedError as error:  # which says something of the rate: a cell without scores
        return {**_named(cell), "diverged": str(error)}


def _named(cell: Cell) -> dict[str, Any]:
    recipe = cell.recipe
    found = {"stage": cell.stage, "name": cell.name, "seed": cell.seed, "lr": recipe.optim.lr, "head": recipe.head}
    return {**found, **({"budget": cell.budget} if cell.budget else {})}


def _measure(work: Path, cell: Cell) -> dict[str, Any]:
    folder = work / cell.key.replace(" ", "_").replace(",", "")
    recipe = replace(cell.recipe, output=str(folder), resume=checkpoint.exists(folder / CHECKPOINTS))
    if cell.weights:
        scores = score(load_model(cell.weights), recipe, cell.scoring)
        return {**_named(cell), "weights": cell.weights, "source_top1": None, "scores": scores}
    source: Any = load_split(replace(recipe.data, label="class"), "train")
    order = np.random.default_rng(0).permutation(len(source))
    train, held = source.subset(np.sort(order[UNTRAINED:])), source.subset(np.sort(order[:UNTRAINED]))
    if recipe.data.label == "teacher":  # which sees no more images than are trained on
        train = limited(train, recipe.data.limit, recipe.seed)
        train, held = (taught(split, recipe.data.teacher, recipe.data.teacher_size) for split in (train, held))
    run = Run(recipe, train, held)
    trained = cell.name != RANDOM
    if trained and not run.fit():
        raise EtfZooError("The time budget ended a run.")
    last, model = run.records[-1] if trained else {}, run.plain_model()
    found = {
        **_named(cell),
        "device": run.accelerator.device.type,
        "steps": run.step,
        "images": run.train_images,
        "seconds": round(run.seconds()),
        "train_top1": last.get("train_top1"),
        # of a teacher's classes it is another thing, no accuracy
        "source_top1": last.get("val_top1") if recipe.data.label == "class" else None,
        "scores": score(model, recipe, cell.scoring),
    }
    if cell.keep:
        weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, work / f"{folder.name}.safetensors")
    shutil.rmtree(folder)
    return found


def rate_source(name: str) -> str:
    """Whose best rate a candidate takes: its own, or that of the same head, plain or behind an MLP."""
    if name in TRYING:
        return name
    head = KINDS[CANDIDATES[name].get("head", "frame")]
    return f"{head}, MLP" if "neck" in CANDIDATES[name].get("model_args", {}) else head


def chosen_rate(
    records: Sequence[dict[str, Any]], stage: int, name: str, rates: Sequence[float] = (), budget: str = ""
) -> float | None:
    """The rate of the best seed-0 run, of this stage and budget or the nearest before it; None without any.

    Args:
        records: Finished cells.
        stage: Of the cells that it is for.
        name: See `rate_source`.
        rates: Those that have to be tried before one of this very stage and budget is chosen.
        budget: See `budget_of`; before it comes the stage's own.
    """
    here = (stage, budget)
    for before in dict.fromkeys([here, *((s, "") for s in (2, 1) if s <= stage)]):
        of_before = [r for r in records if (r["stage"], r.get("budget", "")) == before]
        tried = [r for r in of_before if (r["name"], r["seed"]) == (name, 0)]
        if before == here and not set(rates) <= {r["lr"] for r in tried}:
            continue
        if scored := [r for r in tried if "scores" in r]:
            return max(scored, key=mean_score)["lr"]
    return None


def tuning_rate(records: Sequence[dict[str, Any]], name: str) -> float:
    """Rate at which a candidate's backbone was tuned best in stage 2, mean over sets; the middle one without a run."""
    by_rate: dict[float, list[float]] = {}
    for record in records:
        if (record["stage"], record.get("budget", ""), record["name"]) == (2, "", name) and "scores" in record:
            for scores in record["scores"].values():
                for rate, accuracy in scores["full_by_rate"].items():
                    by_rate.setdefault(float(rate), []).append(accuracy)
    return max(by_rate, key=lambda rate: statistics.mean(by_rate[rate])) if by_rate else SCORING[3].rates[0]


def budget_of(args: argparse.Namespace) -> str:
    """What of the budget is not the stage's, in words; empty if all is. Tables put such cells apart."""
    asked = {"epochs": args.epochs, "images": args.images}
    return ", ".join(f"{number} {what}" for what, number in asked.items() if number)


def plan(args: argparse.Namespace, records: Sequence[dict[str, Any]], first: bool) -> list[Cell]:
    """Cells to measure: first what tries all rates (not in stage 3), then all at the rates chosen."""
    changes = {"epochs": args.epochs} if args.epochs else {}
    if args.images:
        changes["data"] = {"limit": args.images}
    scoring, budget = replace(SCORING[args.stage], sets=tuple(args.sets)), budget_of(args)
    cells = []
    for seed in args.seeds or ((0, 1, 2) if args.stage == 3 else (0,)):
        for name in args.only or CANDIDATES:
            source = rate_source(name)
            tries = bool(args.rates) and name in TRYING and args.stage < 3 and seed == 0
            if first:
                rates = args.rates if tries else []
            else:
                rate = chosen_rate(records, args.stage, source, args.rates, budget)
                rates = [] if tries or rate is None else [rate]
                if rate is None:
                    print(f"{name} is left out: no rate is known, run {source!r} first.")
            for rate in rates:
                recipe = recipe_of(args.stage, name, rate, seed, changes)
                how = replace(scoring, rates=(tuning_rate(records, name),)) if args.stage == 3 else scoring
                cells.append(Cell(args.stage, name, seed, recipe, how, args.stage == 3, budget))
    return cells


def finished(args: argparse.Namespace) -> list[Cell]:
    """Cells of `FINISHED`, by the scoring of a stage; what is not there is told."""
    scoring, cells = replace(SCORING[args.stage], sets=tuple(args.sets)), []
    for name, weights in FINISHED.items():
        folder = model_folder(weights)
        if folder is None or not (folder / WEIGHTS_NAME).is_file():
            print(f"{name} is left out: there are no weights in {weights}.")
            continue
        recipe = parse(Recipe, ["--config", str(folder / "recipe.yaml")])
        cells.append(Cell(args.stage, name, recipe.seed, recipe, scoring, budget="weights of the zoo", weights=weights))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=tuple(STAGES))
    parser.add_argument(
        "--only", nargs="+", choices=tuple(CANDIDATES), metavar="NAME", help="by default all candidates"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0, in stage 3 0 1 2")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=list(RATES), help="to try; none for those that a stage before chose"
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--epochs", type=int, default=0, help="instead of the stage's")
    parser.add_argument("--images", type=int, default=0, help="of the source, instead of the stage's")
    parser.add_argument("--finished", action="store_true", help="train nothing, score weights of the zoo")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args()
    results, failed = Results(args.results / CELLS, args.work / "locks"), []
    if args.stage:
        if args.jobs > 1:
            decode(args)
        how = partial(measure, args.work), results, args.work / "locks", args.jobs
        if args.finished:
            failed += run_grid(finished(args), *how)
        else:  # the second round takes the rates that the first found
            for first in (True, False):
                failed += run_grid(plan(args, list(results.read().values()), first), *how)
    write_tables(list(results.read().values()), args.results, list(CANDIDATES))
    raise_failed(failed)


if __name__ == "__main__":
    run_script(main)
