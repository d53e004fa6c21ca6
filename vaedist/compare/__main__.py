"""python -m vaedist.compare RUN RUN ...    what differs between runs, in their recipes, numbers, curves and pictures"""

import argparse
import gc
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from shards.files import replacing
from vaedist.compare import online, records, table, view
from vaedist.compare.comparison import Comparison
from vaedist.compare.metrics import chosen, usual
from vaedist.compare.page import page
from vaedist.compare.runs import Run, expand, read
from vaedist.config import ConfigError

WIDE = (120, 24)  # where there is no terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a word means no run or anything else is wrong, also if the other runs are compared."""
    options = parser().parse_args(arguments)
    with ExitStack() as stack:
        runs, whole = gather(options.runs, stack)
        try:
            if not runs:
                raise ConfigError("there is no run to compare")
            compare(runs, options)
        except (ConfigError, OSError) as error:
            complain(error)
            return 1
    return 0 if whole else 1


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vaedist.compare", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a directory, a glob, or entity/project/RUN_OR_GROUP of W&B"
    )
    parser.add_argument("--metrics", metavar="A,B", help="what to show: names or patterns such as train/*")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row for each run and for each configuration")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, with recipes and curves")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="a page with curves and pictures, which needs no network"
    )
    parser.add_argument("--report", action="store_true", help="save the comparison as a view of the project on W&B")
    return parser


def gather(words: Sequence[str], stack: ExitStack) -> tuple[list[Run], bool]:
    """The runs that the words mean, each once, and whether every word means one; a line says which does not.

    W&B is asked for what is not here; `stack` keeps it open for the pictures.
    """
    runs: dict[Path | str, Run] = {}
    whole, elsewhere = True, []
    for word in words:
        try:
            paths = expand(word)
            named = online.is_name(word) and not any(path.exists() for path in paths)
        except OSError as error:
            whole = complain(error)
            continue
        if named:
            elsewhere.append(word)
            continue
        for path in paths:
            try:
                runs.setdefault(path.resolve(), read(path))
            except (ConfigError, OSError) as error:
                whole = complain(error)
        if not paths:
            whole = complain(f"{word}: matches no run")
    try:
        api = stack.enter_context(online.server()) if elsewhere else None
    except ConfigError as error:
        return list(runs.values()), complain(f"{', '.join(elsewhere)}: no such directory, and {error}")
    for word in elsewhere:
        try:
            runs |= {run.path: run for run in online.find(word, api)}
        except ConfigError as error:
            whole = complain(error)
    return list(runs.values()), whole


def compare(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Prints the table and writes what was asked for."""
    comparison = Comparison(runs)
    known = comparison.metrics
    metrics = chosen(options.metrics.split(","), known) if options.metrics else usual(known)
    for line in table.text(comparison, metrics, shutil.get_terminal_size(WIDE).columns):
        print(line)
    outputs: list[tuple[Path | None, Callable[[], bytes]]] = [
        (options.csv, lambda: records.as_csv(comparison, metrics)),
        (options.json, lambda: records.as_json(comparison, metrics)),
        (options.html, lambda: page(comparison, metrics)),
    ]
    for path, content in outputs:
        if path is not None:
            with replacing(path) as file:
                size = file.write(content())
            print(f"{path}: {size / 1e6:.1f} MB")
    if options.report:
        with online.server() as api:
            print(f"W&B: {view.save(comparison, metrics, api)}")


def complain(error: object) -> bool:
    """Says what is wrong; False."""
    print(f"vaedist: {error}", file=sys.stderr)
    return False


if __name__ == "__main__":
    gc.disable()  # it would look through millions of points for cycles, which there are none of, a third of the time
    sys.exit(main())
