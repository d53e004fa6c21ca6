"""Runs whose disk is full: what they say, what they keep, and that they go on from it."""

import itertools
from pathlib import Path

import cases
import pytest
from disk import make_room, small_disk
from launching import complaints, launch

from vaedist.console import Console
from vaedist.tracker import Files, keep_rows
from vaedist.train import main


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@pytest.mark.slow
def test_a_run_without_room_for_its_checkpoints_ends_or_trains_on_as_told_and_with_room_goes_on(
    tmp_path, capsys, monkeypatch
):
    data, whole, run = tmp_path / "set", tmp_path / "whole", tmp_path / "run"
    cases.pack_discs(data)
    told = {"train_steps": 8, "checkpoint_every": 2, "checkpoint_keep": 1}
    assert main(cases.words("vae", data, whole, **told)) == 0
    size = sum(file.stat().st_size for file in (whole / "checkpoints" / "step-00000008").iterdir())
    capsys.readouterr()
    words, disk = cases.words("vae", data, run, **told), run / "checkpoints"
    run.mkdir()
    with small_disk(disk, size * 3 // 2 // 1024):
        assert main(words) == 1
        files = tuple(f"{disk}/.step-{step:08d}.draft/optimizer.safetensors" for step in (4, 6, 8))
        reason = "No space left on device"
        first = "step-00000002 is the newest checkpoint; make room on this disk"
        line = f"vaedist: {files[0]}: {reason}: step 4 is not saved, {first}, then give the same command again"
        said = capsys.readouterr()
        assert complaints(said.err) == [line]
        assert "complete" not in said.out
        assert names(disk) == ["step-00000002"]

        done = launch(*words, processes=2)
        assert done.returncode != 0
        assert complaints(done.stderr) == [line]
        assert "[rank1]" not in done.stderr  # it learns of it, and leaves without a traceback
        assert names(disk) == ["step-00000002"]

        assert main([*words, "checkpoint.required=false"]) == 1
        said = capsys.readouterr()
        warnings = [other for other in said.out.splitlines() if reason in other]
        assert warnings == [
            f"{file}: {reason}: step {step} is not saved, {first}; training goes on"
            for step, file in zip((4, 6), files, strict=False)
        ]
        assert complaints(said.err) == [line.replace("00000004", "00000008").replace("step 4", "step 8")]
        assert len(cases.rows(run)) == 8
        assert "complete" not in said.out

        say = Console.say

        def make_room_when_told(self: Console, line: str) -> None:
            say(self, line)
            if reason in line:
                make_room(disk)

        monkeypatch.setattr(Console, "say", make_room_when_told)
        assert main([*words, "checkpoint.required=false"]) == 0
        said = capsys.readouterr()
        assert said.out.count(reason) == 1
        assert said.out.splitlines()[-1].startswith(f"{run}: complete at step 8")
        assert names(disk) == ["step-00000008"]
        assert cases.terms(run) == cases.terms(whole)


def test_a_run_directory_without_room_is_named_and_loses_no_row_that_was_written(tmp_path):
    run, written = tmp_path / "run", []
    with small_disk(run, 16):
        files = Files(run, 0, lambda: None)

        def log_for_ever() -> None:
            for step in itertools.count(1):
                written.append(step)
                files.log({"step": step, "seen": 0.0})

        with pytest.raises(OSError, match="No space left on device") as raised:
            log_for_ever()
        assert raised.value.filename == str(run / "metrics.jsonl")
        files.close(failed=True)
        make_room(run)
        keep_rows(run / "metrics.jsonl", done=10**6)
        assert [row["step"] for row in cases.rows(run)] == written[:-1]
