"""A small source in the layout of CelebA: drawn noise as photographs, annotations with the original's quirks."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 18, 22
SHARD_MB = 0.012  # three or four of these images a shard
ATTRIBUTES = ("Male", "Young", "Smiling")
LANDMARKS = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y"


def photograph(seed: int, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=80)
    return stream.getvalue()


def names(count: int) -> list[str]:
    return [f"{image:06d}.jpg" for image in range(1, count + 1)]


def label(image: int, column: int) -> int:
    """-1 or 1, differently for every attribute."""
    return 1 if image >> column & 1 else -1


def write_source(root: Path, count: int = 12) -> Path:
    """Images 1..count, of which the last two are test and the two before valid, with the lists that are required."""
    (root / "img_align_celeba").mkdir(parents=True)
    for image, name in enumerate(names(count), 1):
        (root / "img_align_celeba" / name).write_bytes(photograph(image))
    rows = "".join(f"{n} {' '.join(f'{label(i, k):2d}' for k in range(3))}\n" for i, n in enumerate(names(count), 1))
    (root / "list_attr_celeba.txt").write_text(f"{count}\n{' '.join(ATTRIBUTES)} \n{rows}")
    rows = "".join(
        f"{n} {0 if i <= count - 4 else 1 if i <= count - 2 else 2}\n" for i, n in enumerate(names(count), 1)
    )
    (root / "list_eval_partition.txt").write_text(rows)
    return root


def add_options(root: Path, count: int = 12) -> None:
    """The lists that not every mirror has, and the factors of a drawn set."""
    numbered = list(enumerate(names(count), 1))
    (root / "identity_CelebA.txt").write_text("".join(f"{n} {i % 5 + 1}\n" for i, n in numbered))
    rows = "".join(f"{n}  " + " ".join(f"{10 * i + k:3d}" for k in range(10)) + "\n" for i, n in numbered)
    (root / "list_landmarks_align_celeba.txt").write_text(f"{count}\n{LANDMARKS}\n{rows}")
    rows = "".join(f"{n}    {i}  {2 * i} 3000 {4 * i}\n" for i, n in numbered)
    (root / "list_bbox_celeba.txt").write_text(f"{count}\nimage_id x_1 y_1 width height\n{rows}")
    (root / "factors.csv").write_text("image_id,hue,turn\n" + "".join(f"{n},{i / 10},{-i}\n" for i, n in numbered))


def zip_images(root: Path, compression: int = zipfile.ZIP_STORED) -> None:
    """Replace the folder by the archive."""
    folder = root / "img_align_celeba"
    with zipfile.ZipFile(root / "img_align_celeba.zip", "w", compression) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"img_align_celeba/{path.name}")
            path.unlink()
    folder.rmdir()


def as_csv(root: Path) -> None:
    """Replace every .txt list by the .csv of the Kaggle mirror."""
    headers = {
        "list_attr_celeba": ",".join(("image_id", *ATTRIBUTES)),
        "list_eval_partition": "image_id,partition",
        "identity_CelebA": "image_id,identity",
        "list_landmarks_align_celeba": "image_id," + LANDMARKS.replace(" ", ","),
        "list_bbox_celeba": "image_id,x_1,y_1,width,height",
    }
    for path in root.glob("*.txt"):
        rows = [",".join(line.split()) for line in path.read_text().splitlines() if ".jpg" in line]
        path.with_suffix(".csv").write_text("\n".join([headers[path.stem], *rows]) + "\n")
        path.unlink()


def whole_source(directory: Path, count: int = 24) -> Path:
    """With every file that CelebA may have."""
    source = write_source(directory, count)
    add_options(source, count)
    return source


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
