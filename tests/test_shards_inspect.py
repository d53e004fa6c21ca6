from dataclasses import replace

import foreign_tars
import http_server
import numpy as np
from foreign_tars import picture, write
from PIL import Image

from shards import manifest
from shards.checking import inspect
from shards.foreign.index import index


def test_a_thousand_classes_are_a_short_table(tmp_path):
    chance = np.random.default_rng(0)
    classes = np.minimum(chance.geometric(0.05, 400), 1000) - 1
    classes[0] = 999
    members = [m for i, c in enumerate(classes) for m in ((f"{i}.npy", PIXEL), (f"{i}.cls", b"%d" % c))]
    found = index([str(write(tmp_path / "a.tar", members))], tmp_path, quiet=True)
    assert len(found.attributes) == 1000
    lines = list(inspect.report(found))
    assert len(lines) < 30
    assert "  and 984 more, then the rarest:" in lines
    shares = [float(line.split()[1]) for line in lines if line.startswith("  class_")]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == round(found.array("train", "labels").mean(axis=0).max(), 3)


PIXEL = foreign_tars.image.to_npy(np.zeros((1, 1, 1), np.uint8))


def test_the_values_of_discrete_factors_are_listed(tmp_path):
    members = []
    for i in range(10):
        text = f'{{"image_id":{i},"factors":{{"few":{i % 3},"many":{i},"free":{i / 7}}}}}'
        members += [(f"{i:06d}.npy", PIXEL), (f"{i:06d}.json", text.encode())]
    found = index([str(write(tmp_path / "a.tar", members))], tmp_path, quiet=True)
    few, many, free = found.factors
    values = tuple(float(i) for i in range(10))
    found = replace(found, factors=(replace(few, values=(0.0, 1.0, 2.0)), replace(many, values=values), free))
    lines = {line.split()[0]: line.split()[1:] for line in inspect.report(found) if line.startswith("  ")}
    assert lines["few"] == ["0.000", "0.900", "2.000", "3:", "0", "1", "2"]
    assert lines["many"][3:] == ["10:", "0", "1", "2", "3", "...", "6", "7", "8", "9"]
    assert lines["free"][3:] == ["continuous"]


def test_the_grid_shows_images_of_any_kind_and_size(tmp_path):
    wide = np.full((10, 400, 3), (255, 0, 0), np.uint8)
    grey = np.full((40, 40, 1), 128, np.uint8)
    members = [("a.png", foreign_tars.image.to_png(wide)), ("b.npy", foreign_tars.image.to_npy(grey))]
    found = index(
        [str(write(tmp_path / "t.tar", members))],
        tmp_path,
        valid=[str(write(tmp_path / "v.tar", [("c.webp", picture(1, "webp"))]))],
        quiet=True,
    )
    assert found.size_text == "of different sizes, the least side 10"
    sheet = np.asarray(inspect.grid(found))
    assert sheet.shape == (2 * inspect.LARGEST, inspect.COLUMNS * inspect.LARGEST, 3)
    assert (sheet[:6, :256] == (255, 0, 0)).all()  # 400 x 10 scaled to fit
    assert (sheet[:40, 256:296] == 128).all()
    assert (sheet[256:293, :31] == foreign_tars.image.decode(picture(1, "webp"), 3)).all()
    assert (sheet[:, 512:] == 255).all()


def test_of_shards_behind_urls_the_grid_shows_the_first(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.tar", [(f"{i}.png", picture(i + ord(name), "png")) for i in range(3)])
    with http_server.serving() as web:
        web.files.update({f"/{name}.tar": (tmp_path / f"{name}.tar").read_bytes() for name in "ab"})
        urls = [f"{web.url}/a.tar?key=secret", f"{web.url}/b.tar"]
        found = index(urls[:1], tmp_path / "set", valid=urls[1:], quiet=True)
        assert [split.shards[0].url for split in found.splits.values()] == urls
        assert f"2 shards lie elsewhere: {web.url}/a.tar?... ..." in list(inspect.report(found))
        inspect.save_grid(manifest.read(tmp_path / "set"), tmp_path / "grid.png")
        with Image.open(tmp_path / "grid.png") as grid:
            sheet = np.asarray(grid)
        assert (sheet[:37, 31:62] == foreign_tars.image.decode(picture(1 + ord("a"), "png"), 3)).all()
        assert set(web.gets) == {"/a.tar", "/b.tar"}
