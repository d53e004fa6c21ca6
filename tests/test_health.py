"""What a health check says of the runs that are trained here."""

import os
import subprocess
import sys
import time

import pytest

from vaedist import health


def test_a_run_is_found_while_a_process_has_its_metrics_open(tmp_path):
    with (tmp_path / "metrics.jsonl").open("ab"):
        assert tmp_path in health.open_runs()
    assert tmp_path not in health.open_runs()
    with (tmp_path / "metrics.jsonl").open("rb"):  # by a reader
        assert tmp_path not in health.open_runs()


@pytest.mark.parametrize(
    ("minutes", "words", "status"), [(0, [], 0), (29, [], 0), (31, [], 1), (31, ["--minutes=60"], 0)]
)
def test_a_run_that_writes_no_more_rows_is_not_healthy(minutes, words, status, tmp_path, monkeypatch, capsys):
    written = time.time() - 60 * minutes
    (tmp_path / "metrics.jsonl").touch()
    os.utime(tmp_path / "metrics.jsonl", (written, written))
    monkeypatch.setattr(health, "open_runs", lambda: {tmp_path, tmp_path / "in another container"})
    assert health.main(words) == status
    assert f"{tmp_path}: the last row was written {60 * minutes} s ago" in capsys.readouterr().out


def test_where_no_run_has_begun_there_is_nothing_to_complain_of(monkeypatch):
    monkeypatch.setattr(health, "open_runs", set)
    assert health.main([]) == 0


def test_a_check_does_not_wait_for_torch_to_be_imported():
    script = "import sys, vaedist.health; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )
