"""Classes that come later: base classes, then sessions of five classes with five images each (2302.03004's protocol).

    python training/incremental.py base --features FOLDER --loss cross_entropy --seed 0    # a backbone on CIFAR-100
    python training/incremental.py photos --features FOLDER    # a pretrained backbone on cub50 and grocery
    python training/incremental.py choose --features FOLDER    # each head's rates, by held-out base images
    python training/incremental.py sessions --features FOLDER  # the protocol
    python training/incremental.py table

Figures go to `training/results/later/`; what they say is in `docs/later_classes.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training.experiments.fscil import choose, sessions, table
from training.experiments.fscil_features import LOSSES, RESULTS, photo_features, train_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("base", "photos", "choose", "sessions", "table"))
    parser.add_argument("--features", type=Path, help="folder of features; all parts but the table take one")
    parser.add_argument("--loss", choices=LOSSES, default=LOSSES[0])
    parser.add_argument("--seed", type=int, default=0, help="of the backbone")
    parser.add_argument("--seeds", type=int, default=3, help="draws on photos, whose backbone is one")
    args = parser.parse_args()
    if args.part == "table":
        (RESULTS / "sessions.md").write_text(table())
        print(table())
        return
    if args.features is None:
        parser.error(f"{args.part} takes --features FOLDER")
    args.features.mkdir(parents=True, exist_ok=True)
    if args.part == "base":
        train_base(args.loss, args.seed, args.features)
    elif args.part == "photos":
        photo_features(args.features)
    elif args.part == "choose":
        choose(args.features)
    else:
        sessions(args.features, args.seeds)


if __name__ == "__main__":
    main()
