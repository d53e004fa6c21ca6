"""python -m launch.slurm recipe=NAME [key.path=value ...] --nodes 2 --gpus 8    or status, logs, stop RUN"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.slurm import jobs
from launch.slurm.jobs import Job
from launch.slurm.sweep import group, written
from shards.manifest import ShardError
from vaedist.words import ConfigError

SCRIPTS = Path(__file__).resolve().parent
FOLLOWING = {
    "status": "the state of runs and of their newest jobs",
    "logs": "the end of a run's newest log",
    "stop": "have runs save and end, or not start if they wait",
}


def main(arguments: Sequence[str]) -> int:
    """The exit status; what is wrong is one line on stderr."""
    try:
        if arguments and arguments[0] in FOLLOWING:
            return _follow(arguments)
        if arguments and arguments[0] == "check":
            _check(arguments[1:])
        else:
            _submit(arguments)
    except (ConfigError, ShardError, OSError) as error:
        print(f"vaedist: {error}", file=sys.stderr)
        return 1
    return 0


def _follow(arguments: Sequence[str]) -> int:
    """The exit status; of several runs one that cannot be stopped keeps no other from it."""
    parser = argparse.ArgumentParser(prog="python -m launch.slurm")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in FOLLOWING.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("runs", metavar="RUN", type=Path, nargs=1 if name == "logs" else "+")
        if name == "logs":
            command.add_argument("-f", "--follow", action="store_true", help="go on as it grows")
    asked = parser.parse_args(arguments)
    if asked.command == "logs":
        jobs.logs(asked.runs[0], asked.follow)
        return 0
    act, failed = {"status": jobs.status, "stop": jobs.stop}[asked.command], 0
    for run in asked.runs:
        try:
            print(act(run))
        except (ConfigError, OSError) as error:
            print(f"vaedist: {error}", file=sys.stderr)
            failed = 1
    return failed


def _check(arguments: Sequence[str]) -> None:
    """For train.sbatch: on stdout the run directory, a port for this job, `grace`, and the words of this task."""
    from launch.slurm import check  # with torch

    parser = argparse.ArgumentParser(prog="train.sbatch", allow_abbrev=False)
    parser.add_argument("--sweep", nargs="+", default=[])
    asked, words = parser.parse_known_args(arguments)
    shared, sweep = written(asked.sweep)
    words = check.chosen(check.runs_of([*shared, *words], sweep))
    recipes = check.recipes_of(words)
    processes = int(os.environ["NODES"]) * int(os.environ["PROCESSES"])
    check.check(recipes, processes, lambda line: print(line, file=sys.stderr))
    words = check.settled(words, recipes)
    if stage := os.environ.get("STAGE"):
        words = check.staged(words, recipes[0], stage)
    port = check.free_port(int(os.environ["SLURM_JOB_ID"]))
    print(recipes[0].run, port, check.grace(), *words, sep="\n")


def _say(line: str) -> None:
    print(line, flush=True)


def _submit(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm",
        usage="%(prog)s recipe=NAME [key.path=value ...] [option ...]    or: status RUN, logs RUN, stop RUN",
        description="Checks a run, submits launch/slurm/train.sbatch for it, and says where its log will be.",
        epilog="Any other option, such as --partition=NAME or --account=NAME, is given to sbatch.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1, help="how many (1)")
    parser.add_argument("--gpus", type=int, default=1, help="of each node, a process for each; 0: nodes without (1)")
    parser.add_argument("--time", help="limit, such as 24:00:00, at which the run saves and is requeued")
    parser.add_argument(
        "--sweep", nargs="+", default=[], metavar="KEY=A,B,C", help="a run for each combination; or a FILE"
    )
    parser.add_argument("--at-once", type=int, metavar="N", help="of a sweep's runs, at most")
    parser.add_argument("--evaluate", action="store_true", help="evaluate each run when it is complete, in another job")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted and when it might start")
    asked, others = parser.parse_known_args(arguments)
    own = [word for word in others if word.startswith("-")]
    shared, sweep = written(asked.sweep)  # now: the file may change before the job begins
    words = [*shared, *(word for word in others if not word.startswith("-"))]
    if not words:
        parser.error("say what to train: recipe=NAME")
    if asked.nodes < 1 or asked.gpus < 0:
        raise ConfigError(f"command line: --nodes {asked.nodes} --gpus {asked.gpus}: 1 and 0 are the least")
    if not os.access("run", os.X_OK) and "VAEDIST" not in os.environ:
        raise ConfigError(f"{Path.cwd()}: the job would find no ./run here: cd {SCRIPTS.parents[1]}")

    from launch.slurm import check  # with torch

    processes = asked.nodes * (asked.gpus or int(os.environ.get("PROCESSES", "1")))
    tasks = [check.recipes_of(run) for run in check.runs_of(words, sweep)]
    runs = [recipes[0].run for recipes in tasks]  # of replicas the first has the job's files
    every = [recipe.run for recipes in tasks for recipe in recipes]
    if len(set(every)) < len(every):
        raise ConfigError("command line: two runs of this sweep are the same run: leave run= and repeated values out")
    for number, recipes in enumerate(tasks):
        check.check(recipes, processes, _say if number == 0 else lambda line: None)  # they differ in a word or two

    array = len(runs) > 1
    place = runs[0].parent if array else runs[0]
    pattern = place.absolute() / ("slurm-%A_%a.log" if array else "slurm-%j.log")
    options = [*own, f"--nodes={asked.nodes}", f"--output={pattern}"]
    options += [f"--job-name={group(words, sweep) if array else runs[0].name}"]
    options += [f"--gpus-per-node={asked.gpus}"] if asked.gpus else []
    options += [f"--time={asked.time}"] if asked.time else []
    options += [f"--array=0-{len(runs) - 1}{f'%{asked.at_once}' if asked.at_once else ''}"] if array else []
    script, given = SCRIPTS / "train.sbatch", [*words, *(["--sweep", *sweep] if sweep else [])]
    _say(f"sbatch {shlex.join([*options, str(script), *given])}")
    if asked.dry_run:
        _say(jobs.when(options, script, given))
        return
    place.mkdir(parents=True, exist_ok=True)
    submitted, waited_for = jobs.submit(options, script, given), dict[Path, str]()
    for task, (first, recipes) in enumerate(zip(runs, tasks, strict=True)):
        name = f"{submitted}_{task}" if array else submitted
        log = Path(str(pattern).replace("%A_%a", name).replace("%j", name))
        _say(f"{first}: job {name}, log {log}")
        for run in [recipe.run for recipe in recipes]:
            waited_for[run] = name
            Job(name, log).write(run)
    gpu = ["--gpus-per-node=1"] if asked.gpus else []
    for run, name in waited_for.items() if asked.evaluate else ():  # when all jobs of the training are written down
        then = [f"--dependency=afterok:{name}", f"--output={run.absolute()}/evaluate-%j.log", *gpu, *own]
        after = jobs.submit(then, SCRIPTS / "evaluate.sbatch", [str(run)])
        _say(f"{run}: evaluated by job {after}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
