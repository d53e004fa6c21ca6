"""What ends a run before its time, with real processes: nothing is lost, nobody waits, and one line says why."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cases
import psutil
import pytest
from attempts import Launched, lines, wait
from launching import complaints

from vaedist import stop

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, object] = {"train_steps": 60, "checkpoint_every": 5, "evaluate_every": 1000}


def script(path: str, *words: object) -> str:
    command = [sys.executable, ROOT / path, *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(data, tmp_path_factory) -> dict:
    """What stops.py found."""
    return json.loads(script("tests/stops.py", data, tmp_path_factory.mktemp("found")))


@pytest.mark.parametrize(("name", "status"), [("SIGUSR1", 75), ("SIGUSR2", 75), ("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_to_any_rank_stops_all_at_one_step_saved_and_asks_for_the_same_command(name, status, found):
    """SIGUSR1 to one rank, SIGUSR2 to the other, SIGTERM to one of them twice, as launcher and scheduler send it."""
    end = found[name]
    assert end["statuses"] == [status, status]
    (line,) = end["said"]
    (step,) = re.findall(rf"stopped at step (\d+) by {name}; the same command resumes$", line)
    assert end["saved"][-1] == f"step-{int(step):08d}"
    assert end["left"] == ([] if name == "SIGINT" else ["REQUEUE"])
    assert "Traceback" not in end["output"]


def test_a_file_asks_for_a_checkpoint_and_another_one_for_the_end_and_both_vanish(found):
    before, asked, end = found["SIGINT"], found["SAVE"], found["STOP"]
    assert asked["statuses"] == [None, None]
    assert end["statuses"] == [75, 75]
    assert len(set(asked["saved"]) - set(before["saved"])) == 1  # once, however often it looked for the file
    (line,) = end["said"]
    (step,) = re.findall(r"stopped at step (\d+) by the file STOP; the same command resumes$", line)
    assert end["saved"][-1] == f"step-{int(step):08d}" > asked["saved"][-1]
    assert end["left"] == []
    assert "as the file SAVE asked" in end["output"]


def test_a_run_that_was_stopped_again_and_again_measures_what_an_undisturbed_one_does(found):
    assert found["equal"]


@pytest.mark.parametrize("how", ["stalled", "busy"])
def test_a_rank_that_hangs_is_named_with_the_collective_and_the_step_and_ends_the_others(how, found):
    end = found[how]
    assert end["statuses"][0] == 1
    (line,) = end["said"]
    expected = r"vaedist: rank 1 of 2 did not answer in time during an? \w.* after step \d+; the same"
    assert re.match(expected, line), line
    assert end["left"] == ["REQUEUE"]
    assert "Traceback" not in end["output"]


def test_a_start_longer_than_the_time_out_of_a_step_is_waited_for(found):
    assert found["slow start"]["statuses"] == [0, 0], found["slow start"]["output"]


def test_a_signal_before_the_first_step_ends_all_at_once(found):
    early = found["early"]
    assert early["statuses"][1] == 75
    assert early["statuses"][0] in (1, 75)
    assert early["seconds"] < 20
    (line,) = complaints(early["output"])
    assert line.endswith("/early: stopped before the first step by SIGTERM; the same command resumes")
    assert "Traceback" not in early["output"]


def test_a_second_start_of_a_run_is_refused_on_all_ranks_and_the_first_goes_on(found):
    second = found["second"]
    assert second["statuses"] == [1, 1]
    assert second["first"] == [None, None]
    (line,) = complaints(second["output"])
    assert re.match(r"vaedist: .*/run: process \d+ on \S+ is training this run; wait for it, or say run=ANOTHER$", line)
    assert "store " not in second["output"]  # nothing was decoded or read
    assert found["started twice"]["statuses"] == [75, 75]


@pytest.mark.slow
def test_twenty_kills_in_all_phases_of_a_run_cost_nothing_but_time():
    table = script("benchmarks/kills.py", 20, "--forked", "--seed", 1)
    rows = re.findall(r"^(.+?) +(\d+) +([\d.]+) s +([\d-]+)$", table, re.MULTILINE)
    assert [name for name, *_ in rows] == ["start-up", "cache build", "training", "checkpoint", "evaluation"], table
    assert all(int(kills) == 4 and float(slowest) < 60 for _, kills, slowest, _ in rows), table
    assert all(said == "1" for name, *_, said in rows if name != "start-up"), table  # there it may be the launcher's
    ((equal, runs),) = re.findall(r"^(\d+) of (\d+) runs have", table, re.MULTILINE)
    assert equal == runs >= "1"


@pytest.mark.slow
def test_a_launcher_that_may_restart_goes_on_by_itself_and_workers_do_not_outlive_one_that_was_killed(data, tmp_path):
    """And what they leave is saved; the curve of all this is the undisturbed one's."""
    words = {name: cases.words("vae", data, tmp_path / name, **SETTINGS) for name in ("run", "whole")}
    whole = Launched(words["whole"], tmp_path / "whole.log")
    run, log = tmp_path / "run", tmp_path / "log"
    launched = Launched(words["run"], log, flags=("--max_restarts", "3"))
    wait(lambda: len(lines(run)) > 6 or launched.ended(), "rows")
    launched.ranks()[1].kill()
    wait(lambda: "resumed at step" in log.read_text() or launched.ended(), "the restart")
    wait(lambda: len(lines(run)) > 12 or launched.ended(), "more rows")
    ranks = launched.ranks()
    launched.process.kill()
    launched.process.wait()
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() for rank in ranks)
    (step,) = re.findall(r"stopped at step (\d+) by SIGTERM", log.read_text())
    assert (run / "checkpoints" / f"step-{int(step):08d}").exists()
    assert (run / "REQUEUE").exists()

    again = Launched(words["run"], log)
    wait(lambda: again.ended() and whole.ended(), "the end")
    assert (again.process.returncode, whole.process.returncode) == (0, 0), log.read_text()
    assert f"resumed at step {step}" in log.read_text()
    assert not (run / "REQUEUE").exists()
    assert lines(run) == lines(tmp_path / "whole")
    assert len(lines(run)) == SETTINGS["train_steps"]


def test_a_file_that_asks_again_is_heard_again(tmp_path, monkeypatch):
    monkeypatch.setattr(stop, "LOOK", 0.0)
    requests, file = stop.Requests([tmp_path]), tmp_path / "SAVE"
    for _ in range(2):  # the second before anybody has looked and seen that the first is gone
        file.touch()
        assert [requests(), requests()] == [stop.SAVE, 0]
        requests.granted(stop.SAVE)
        assert not file.exists()
    assert requests() == 0


def test_a_process_that_another_one_ends_finishes_the_checkpoint_it_is_writing():
    script = """
import threading, time
from torch.distributed import TCPStore
from vaedist.checkpoint import WRITING
from vaedist.peers import Peers

def write():
    with WRITING:
        begun.set()
        time.sleep(2)
        print("written", flush=True)

begun, store = threading.Event(), TCPStore("127.0.0.1", 0, is_master=True)
ended, ends = Peers(0, 2, store), Peers(1, 2, store)
threading.Thread(target=write).start()
begun.wait()
ends.end("why")
time.sleep(30)
print("still there")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, "written\n", "vaedist: why\n")
