"""The page of a comparison: whole in one file, safe against what runs are called, and rendered by a browser."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import some_runs

from vaedist.compare import page as page_module
from vaedist.compare.comparison import Comparison
from vaedist.compare.page import album, page
from vaedist.compare.runs import read
from vaedist.pictures import encoded

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&"
BROWSER = "not an origin"  # who asks, in its log, where it is no page
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def runs(tmp_path):
    """Two seeds and another beta, of a data set and a picture with a hostile name; the last has seen less."""
    picture = encoded(np.full((8, 8, 3), 200, np.uint8))
    animation = encoded(np.stack([np.full((8, 8, 3), shade, np.uint8) for shade in (0, 255)]))
    found = []
    for n, (seed, beta, steps) in enumerate([(0, 4.0, (10, 20, 30)), (1, 4.0, (10, 20, 30)), (0, 8.0, (10, 20))]):
        run = tmp_path / f"{n}<b>'\"&"
        some_runs.write(
            run,
            {"eval/elbo": [-3.0 - n, -2.0 - n, -1.0 - n], HOSTILE: [1.0, 2.0, 3.0]},
            seed=seed,
            objective__beta=beta,
            objective__likelihood=HOSTILE if beta == 8 else "bernoulli",
        )
        for step in steps:
            some_runs.draw(run, "samples.png", step, picture)
        some_runs.draw(run, "swaps.gif", 10 * (n + 1), animation)
        found.append(read(run))
    return found


def data_of(content: bytes) -> dict:
    (text,) = re.findall(rb'<script type="application/json" id="data">(.*?)</script>', content, re.DOTALL)
    return json.loads(text)


def test_what_files_say_stays_text(runs):
    content = page(Comparison(runs), [HOSTILE])
    assert HOSTILE.encode() not in content
    found = data_of(content)
    assert found["configurations"][1]["differs"]["objective.likelihood"] == HOSTILE
    assert found["runs"][0]["run"] == runs[0].name
    assert found["runs"][0]["curves"][HOSTILE]["value"] == [1.0, 2.0, 3.0]


def test_pictures_are_in_the_page_at_the_steps_that_the_runs_share(runs):
    samples, swaps = album(runs)
    assert [view["title"] for view in samples["views"]] == ["step 10", "step 20"]
    first = samples["views"][-1]["pictures"][0]
    assert (
        base64.b64decode(first["source"].removeprefix("data:image/png;base64,"))
        == runs[0].pictures["samples"][20].read()
    )
    (last,) = swaps["views"]
    assert [(one["run"], one["step"]) for one in last["pictures"]] == [(0, 10), (1, 20), (2, 30)]
    assert last["pictures"][0]["source"].startswith("data:image/gif;base64,")


def test_a_picture_without_content_takes_no_room_from_the_others(runs, monkeypatch):
    def shown() -> int:
        return sum(bool(one["source"]) for name in album(runs) for view in name["views"] for one in view["pictures"])

    before = shown()
    own = runs[0].pictures["samples"]
    monkeypatch.setitem(own, 20, own[20]._replace(read=lambda: b""))  # the last step that all have
    assert shown() == before - 1


def test_pictures_beyond_the_limit_are_left_out_the_earlier_steps_first(runs, monkeypatch):
    sizes = [len(own[max(own)].read()) for run in runs for own in run.pictures.values()]
    monkeypatch.setattr(page_module, "BYTES", sum(sizes))
    samples, swaps = album(runs)
    assert [view["title"] for view in samples["views"]] == ["step 20"]
    assert all(one["source"] for view in (*samples["views"], *swaps["views"]) for one in view["pictures"])
    monkeypatch.setattr(page_module, "BYTES", sum(sizes) - 1)
    _, swaps = album(runs)
    assert [bool(one["source"]) for one in swaps["views"][0]["pictures"]] == [True, True, False]


def test_long_curves_are_thinned_and_keep_their_last_point(tmp_path):
    run = read(some_runs.write(tmp_path / "long", {"eval/elbo": [float(-n) for n in range(1999)]}))
    curve = data_of(page(Comparison([run]), ["eval/elbo"]))["runs"][0]["curves"]["eval/elbo"]
    assert len(curve["step"]) <= page_module.POINTS
    assert curve["step"][-1] == 19990
    assert curve["value"][-1] == -1998


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_without_network_renders_the_page_without_a_word(runs, tmp_path):
    path, log = tmp_path / "page.html", tmp_path / "net.json"
    path.write_bytes(page(Comparison(runs), ["eval/elbo", HOSTILE]))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", f"--log-net-log={log}"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, "--dump-dom", f"file://{path}"], capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "[.WebGL-" not in line]  # GL's own notes
    assert said == []
    events = [event.get("params") or {} for event in json.loads(log.read_text())["events"]]
    assert [event["url"] for event in events if event.get("initiator", BROWSER) != BROWSER] == []
    body = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert body.count("<img ") == 6
    assert 'onerror="' not in body.replace("onerror=alert(1)", "")
    assert (
        len(re.findall('class="[^"]*js-plotly-plot', body)) == 4
    )  # the chosen metric, two small ones, the parallel axes
