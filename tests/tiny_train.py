"""train.py with the model of tiny_model.py: `tiny_train.py WORDS`, as a launcher starts it."""

import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
import tiny_model

from vaedist import recipe

TRAIN = Path(__file__).parents[1] / "vaedist" / "train.py"
load_all = recipe.load_all


def load_tiny(words: list[str]) -> Any:
    found, dry_run = load_all(words)
    return [replace(each, model=tiny_model.Config()) for each in found], dry_run


if __name__ == "__main__":
    recipe.load_all = load_tiny
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")
