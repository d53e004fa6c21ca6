import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from damage import flip, republish
from tiny_celeba import add_options, photograph, write_source

from shards import manifest
from shards.checking.stock import stock_faults
from shards.checking.tars import samples, tars
from shards.checking.verify import verify
from shards.files import replacing
from shards.manifest import ShardError
from shards.packing import pack
from shards.packing.plan import Options


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    source = write_source(tmp_path_factory.mktemp("verify") / "source", 24)
    add_options(source, 24)
    return pack.pack_celeba(
        source, source.with_name("set"), options=Options(shard_mb=0.012), workers=1, quiet=True
    ).directory


@pytest.fixture
def found(packed, tmp_path):
    return manifest.read(shutil.copytree(packed, tmp_path / "set"))


def place(found, image):
    """Tar and offset of the payload of a training image."""
    row = found.array("train", "index")[image - 1]
    return found.shard_path("train", row["shard"]), int(row["offset"])


def test_a_sound_set_has_no_faults(found):
    assert verify(found.directory) == []
    assert verify(found.directory, deep=True, quiet=True) == []


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the collector
def test_stock_webdataset_is_held_to_keys_members_and_bytes(found):
    assert verify(found.directory, stock=True, quiet=True) == []
    job = samples(found, tars(found)[0], ())
    name, keys = job.tar.shard.name, job.keys

    def faults(**changes):
        return [line.removeprefix(f"{name}: ") for line in stock_faults(replace(job, **changes))]

    assert faults(keys=[keys[1], keys[0], *keys[2:]]) == [
        "webdataset reads 000001 where the index has 000002",
        "webdataset reads 000002 where the index has 000001",
    ]
    last = keys[-1]
    assert faults(index=job.index[:-1], keys=keys[:-1]) == [
        f"webdataset reads a sample {last} that is not in the index"
    ]
    again = np.append(job.index, job.index[:1])
    assert faults(index=again, keys=[*keys, "000001"]) == ["webdataset does not read sample 000001"]
    other = job.index.copy()
    other["offset"][2] += 1
    assert faults(index=other) == ["sample 000003: webdataset reads another image than the index says"]
    other = job.index.copy()
    other["image"][2] += 1
    assert faults(index=other) == ["sample 000003: webdataset reads no json of this image"]


def test_what_stock_webdataset_passes_over_is_told(found):
    job = samples(found, tars(found)[0], ())
    flip(job.tar.path, int(job.index["offset"][1]) - 512 + 20)
    assert stock_faults(job) == [
        f"{job.tar.shard.name}: {job.tar.path}: byte {job.index['offset'][1] - 512}: "
        "a damaged tar header after '000001.json'"
    ]


@pytest.mark.parametrize("options", [Options(npy=8, crop=16), Options(shuffle=3)])
def test_scaled_shuffled_and_differing_images_have_no_false_faults(tmp_path, options):
    source = write_source(tmp_path / "source")
    (source / "img_align_celeba" / "000003.jpg").write_bytes(photograph(3, 40, 30))
    found = pack.pack_celeba(source, tmp_path / "set", options=options, workers=1, quiet=True)
    assert (found.height is None) == (options.npy is None)
    assert verify(found.directory, deep=True, stock=True, quiet=True) == []


def test_every_value_of_a_discrete_factor_must_be_one_of_its_own(found):
    hue, turn = found.factors
    values = np.unique(np.concatenate([found.array(split, "factors")[:, 0] for split in found.splits]))
    manifest.write(replace(found, factors=(replace(hue, values=tuple(values.tolist())), turn)))
    assert verify(found.directory, deep=True, quiet=True) == []
    manifest.write(replace(found, factors=(replace(hue, values=tuple(values[1:].tolist())), turn)))
    assert verify(found.directory, deep=True, quiet=True) == [
        f"train.factors.npy: sample 000001: hue has none of its {len(values) - 1} values"
    ]
    manifest.write(replace(found, factors=(hue,)))
    assert "train.factors.npy: not as many columns as the manifest has names" in verify(
        found.directory, deep=True, quiet=True
    )


@pytest.mark.parametrize("at", range(0, 500, 7))
def test_a_flipped_byte_anywhere_in_the_header_names_the_sample(found, at):
    path, offset = place(found, 6)
    flip(path, offset - 512 + at)
    sha, *deep = verify(found.directory, deep=True, quiet=True)
    assert sha == f"{path.name}: its sha256 is not the one in the manifest"
    assert len(deep) == 1
    assert deep[0].startswith(f"{path.name}: sample 000006 (byte {offset}): the tar header of its image is damaged")


def test_a_flipped_byte_in_the_image_names_the_sample(found):
    path, offset = place(found, 6)
    flip(path, offset + 400)
    faults = verify(found.directory, deep=True, quiet=True)
    assert f"{path.name}: its sha256 is not the one in the manifest" in faults
    where = f"{path.name}: sample 000006 (byte {offset})"
    assert f"{where}: the crc32 of its image is not the one in the index" in faults
    assert len([fault for fault in faults if "sample" not in fault]) == 1
    assert all(fault.startswith(where) for fault in faults if "sample" in fault)


def test_a_flipped_byte_in_the_json_names_the_sample(found):
    path, offset = place(found, 6)
    data = path.read_bytes()
    for text in (b'"Young":1', b'"Young":', b'"identity":2', b'"hue":0.6', b'"image_id":6'):
        flip(path, data.index(text, offset) + len(text) - 1)
        faults = verify(found.directory, deep=True, quiet=True)
        assert len(faults) == 2
        assert faults[1].startswith(f"{path.name}: sample 000006 (byte {offset}): its json")
        path.write_bytes(data)


def test_many_faults_are_all_listed(found):
    for image in (2, 6, 7, 20):
        path, offset = place(found, image)
        flip(path, offset + 400)
    faults = verify(found.directory, deep=True, quiet=True)
    assert [fault.split()[2] for fault in faults if "crc32" in fault] == ["000002", "000006", "000007", "000020"]


@pytest.mark.parametrize("name", ["index", "labels", "factors", "identity", "landmarks", "bbox"])
def test_a_flipped_byte_in_an_array_names_the_array(found, name):
    flip(found.directory / f"valid.{name}.npy", -1)
    expected = [f"valid.{name}.npy: its sha256 is not the one in the manifest"]
    assert verify(found.directory) == expected
    if name == "index":
        expected += ["valid.index.npy: the samples of valid cannot be found without it"]
    assert verify(found.directory, deep=True, quiet=True) == expected


def test_a_flipped_byte_anywhere_in_the_manifest_is_noticed_on_reading(found):
    path = found.directory / "manifest.json"
    size = path.stat().st_size
    for at in range(0, size, max(1, size // 150)):
        flip(path, at)
        with pytest.raises(ShardError, match=r"manifest.json: damaged or of another version") as caught:
            verify(found.directory)
        assert "\n" not in str(caught.value)
        flip(path, at)
    assert verify(found.directory) == []


def test_missing_short_and_stray_files_are_named(found):
    found.shard_path("train", 0).unlink()
    path = found.shard_path("train", 1)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-512])
    (found.directory / "train-00077.tar").touch()
    for deep in (False, True):
        faults = verify(found.directory, deep=deep, quiet=True)
        assert faults[:3] == [
            "train-00000.tar: missing",
            f"train-00001.tar: {size - 512} bytes where the manifest says {size}",
            "train-00077.tar: not in the manifest, yet a reader of *.tar would take it",
        ]


def test_a_truncated_shard_names_every_sample_that_is_gone(found):
    path, offset = place(found, 6)
    path.write_bytes(path.read_bytes()[: offset - 512])
    faults = verify(found.directory, deep=True, quiet=True)
    index = found.array("train", "index")
    gone = index["image"][(index["shard"] == index["shard"][5]) & (index["image"] >= 6)]
    assert {fault.split()[2] for fault in faults[1:]} == {f"{image:06d}" for image in gone}


def test_deep_finds_what_consistent_checksums_hide(found):
    labels = found.array("valid", "labels").copy()
    labels[1, 2] = 2
    republish(found, "valid", "labels", labels)
    assert verify(found.directory) == []
    row = found.array("valid", "index")[1]
    where = f"valid-00000.tar: sample {row['image']:06d} (byte {row['offset']})"
    assert verify(found.directory, deep=True, quiet=True) == [
        f"valid.labels.npy: sample {row['image']:06d}: a label is neither 0 nor 1",
        f"{where}: its json and labels.npy disagree about attributes",
    ]


def test_deep_compares_the_names_of_attributes(found):
    manifest.write(replace(found, attributes=("Female", *found.attributes[1:])))
    faults = verify(found.directory, deep=True, quiet=True)
    assert len(faults) == 24
    assert all(fault.endswith("its json does not have the attributes of the manifest") for fault in faults)


def test_deep_compares_the_index_with_the_tars(found):
    index = found.array("valid", "index").copy()
    index["image"][0] += 1
    republish(found, "valid", "index", index)
    faults = verify(found.directory, deep=True, quiet=True)
    assert any("the tar has '000021.jpg' where its image should be" in fault for fault in faults)
    assert all(fault.startswith("valid-00000.tar: sample 000022") for fault in faults)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("offset", 2**64 - 1, "sample 000021 (byte 18446744073709551615): its image does not lie in the tar"),
        ("offset", 0, "sample 000021 (byte 0): its image does not lie in the tar"),
        ("length", 2**32 - 1, "its image does not lie in the tar"),
        ("shard", 2**32 - 1, "valid.index.npy: [1] samples in the shards where the manifest says [2]"),
    ],
)
def test_an_absurd_index_is_a_fault_like_others(found, field, value, words):
    index = found.array("valid", "index").copy()
    index[field][0] = value
    republish(found, "valid", "index", index)
    assert any(words in fault for fault in verify(found.directory, deep=True, quiet=True))


def test_an_index_or_array_of_another_form_is_a_fault_like_others(found):
    republish(found, "valid", "index", np.zeros(2))
    assert any("dtype float64 where" in fault for fault in verify(found.directory, deep=True, quiet=True))
    republish(found, "valid", "index", np.array(2))
    with pytest.raises(ShardError, match=r"valid.index.npy: shape \[\] for 2 samples"):
        verify(found.directory, deep=True, quiet=True)


def test_deep_compares_every_size_with_the_manifest(found):
    manifest.write(replace(found, width=17))
    faults = verify(found.directory, deep=True, quiet=True)
    assert len(faults) == 24
    assert all(fault.endswith("its image is 18 x 22, the set 17 x 22") for fault in faults)


def test_reading_says_what_is_missing_and_how_to_make_it(tmp_path, found):
    with pytest.raises(ShardError, match="there is no such data set; make it with `python -m shards pack"):
        manifest.read(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"incomplete \(no manifest.json\); make it with"):
        manifest.read(tmp_path)
    with pytest.raises(ShardError, match="no split 'tset'; this set has train, valid, test"):
        found.array("tset", "labels")
    with pytest.raises(ShardError, match="split 'test' has no array 'label'; it has index, labels"):
        found.array("test", "label")
    path = found.directory / "test.labels.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"test.labels.npy: 133 bytes where the manifest says 134"):
        found.array("test", "labels")
    fields = json.loads((found.directory / "manifest.json").read_text())
    (found.directory / "manifest.json").write_text(json.dumps(fields | {"format": "vaedist-shards-9"}))
    with pytest.raises(ShardError, match="format 'vaedist-shards-9', this program reads 'vaedist-shards-2'"):
        manifest.read(found.directory)


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with replacing(path) as stream:
            stream.write(photograph(1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
