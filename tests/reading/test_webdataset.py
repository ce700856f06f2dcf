"""Rows of a tar: what a sound archive gives, and what each kind of bad sample gives."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import tarfile

import pytest
from webdataset.tariterators import base_plus_ext

from pipeline.reading.webdataset import split_name
from pipeline.samples import Sample, Unreadable


def keys(rows):
    return [row.sample.key if isinstance(row, Unreadable) else row.key for row in rows]


def test_a_sound_archive_gives_every_sample_with_caption_columns_and_edit_request(read_tar, tar_bytes, samples, png):
    rows = read_tar(tar_bytes(samples(7)))
    assert all(isinstance(row, Sample) for row in rows)
    assert [row.image for row in rows] == [png(number) for number in range(7)]
    assert rows[4].id == "shard.tar/0004"
    assert rows[4].caption == "face 4"
    assert rows[4].columns == {"number": 4}
    assert rows[4].edits == {"concepts": [{"prompt": "hat 4"}]}
    assert rows[4].image_name == "png"


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_read_in_every_format_of_tar(read_tar, tar_bytes, png, kind):
    folder = "/".join(["folder"] * (20 if kind == tarfile.USTAR_FORMAT else 60))
    names = [f"{folder}/a.png", f"{folder}/ä€.png", "short.png"]
    rows = read_tar(tar_bytes([(name, png(at)) for at, name in enumerate(names)], kind=kind))
    assert keys(rows) == [name[:-4] for name in names]
    assert [row.image for row in rows] == [png(0), png(1), png(2)]


@pytest.mark.parametrize("name", ["shard.tar.gz", "shard.tgz", "misnamed.tar"])
def test_a_packed_archive_gives_the_same_rows(read_tar, tar_bytes, samples, name):
    data = tar_bytes(samples(5))
    assert [row.image for row in read_tar(gzip.compress(data), name=name)] == [row.image for row in read_tar(data)]


def test_keys_and_extensions_are_split_as_webdataset_splits_them():
    for name in ["a.jpg", "a/b.c/d.seg.png", "x.y/z", "a.b.c.d", "dir.with.dots/e.txt"]:
        key, ext = base_plus_ext(name)
        if key is not None:
            assert split_name(name) == (key, ext)
    assert split_name("a/B.JPEG") == ("a/B", "jpg")
    assert split_name("./a.Mask.PNG") == ("a", "mask.png")
    assert split_name("._a.jpg") is None
    assert split_name("__meta__/x.json") is None


def test_the_first_kind_of_image_is_taken_unless_one_is_named_and_masks_are_none(read_tar, tar_bytes, png):
    data = tar_bytes([("a.mask.png", png(0)), ("a.png", png(1)), ("a.jpg", png(2)), ("a.cls", b"7")])
    (row,) = read_tar(data)
    assert (row.image, row.image_name, row.mask) == (png(2), "jpg", png(0))
    assert row.members == {"png": png(1), "cls": b"7"}
    (row,) = read_tar(data, image="PNG")
    assert (row.image, row.image_name) == (png(1), "png")
    (row,) = read_tar(data, image="jpeg", mask="png")
    assert (row.image, row.mask) == (png(2), png(1))


def test_our_own_output_can_be_read_again(read_tar, tar_bytes, png):
    names = ["a.edited.png", "a.input.png", "a.mask.0.png", "a.mask.png"]
    (row,) = read_tar(tar_bytes([(name, png(at)) for at, name in enumerate(names)]))
    assert (row.image_name, row.image, row.mask) == ("input.png", png(1), png(3))
    (row,) = read_tar(tar_bytes([("a.edited.png", png(0)), ("a.mask.0.png", png(1)), ("a.mask.1.png", png(2))]))
    assert row.image_name == "edited.png"


def test_directories_and_hidden_files_are_no_samples(read_tar, tar_bytes, png):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("faces")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in ["faces/._a.png", "faces/.DS_Store", "faces/a.png"]:
            info = tarfile.TarInfo(name)
            info.size = len(png(0))
            archive.addfile(info, io.BytesIO(png(0)))
    assert keys(read_tar(buffer.getvalue())) == ["faces/a"]


def bad(row, *words):
    assert isinstance(row, Unreadable)
    assert row.error_class == "ReadError"
    for word in words:
        assert word in row.message
    return True


def test_a_sample_without_an_image_is_reported_with_what_it_has(read_tar, tar_bytes, png):
    rows = read_tar(tar_bytes([("a.txt", b"hello"), ("b.png", png(0))]))
    assert bad(rows[0], "no image member", "txt")
    assert rows[0].sample.caption == "hello"
    assert isinstance(rows[1], Sample)
    (row,) = read_tar(tar_bytes([("b.png", png(0))]), image="jpg")
    assert bad(row, "'jpg'", "source.image", "png")


def test_a_member_that_is_there_twice_is_reported(read_tar, tar_bytes, png):
    rows = read_tar(tar_bytes([("a.jpg", png(0)), ("a.jpeg", png(1)), ("b.jpg", png(2))]))
    assert bad(rows[0], "jpg is there twice")
    assert isinstance(rows[1], Sample)


def test_a_key_that_returns_later_is_reported_under_an_id_of_its_own(read_tar, tar_bytes, png):
    rows = read_tar(tar_bytes([("a.png", png(0)), ("b.png", png(1)), ("a.png", png(2)), ("a#2.png", png(3))]))
    assert bad(rows[2], "was there before")
    ids = [row.sample.id if isinstance(row, Unreadable) else row.id for row in rows]
    assert ids[:3] == ["shard.tar/a", "shard.tar/b", "shard.tar/a#2"]
    assert len(set(ids)) == 4


def test_files_that_a_dot_merges_into_one_key_are_reported_one_by_one(read_tar, tar_bytes, png):
    members = [(f"img.v1.{number:04d}.jpg", png(number)) for number in range(4)]
    rows = read_tar(tar_bytes([*members, ("z.jpg", png(9))]))
    assert len(rows) == 5
    for number, row in enumerate(rows[:4]):
        assert bad(row, f"img.v1.{number:04d}.jpg", "first dot", "share")
    assert len({row.sample.id for row in rows[:4]}) == 4
    assert isinstance(rows[4], Sample)


def test_a_single_image_with_further_dots_is_read(read_tar, tar_bytes, png):
    (row,) = read_tar(tar_bytes([("img.v1.jpg", png(0)), ("img.txt", b"x")]))
    assert (row.image, row.image_name, row.caption) == (png(0), "v1.jpg", "x")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_devices_and_pipes_are_reported_and_never_followed(read_tar, png, kind):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        odd = tarfile.TarInfo("a.png")
        odd.type, odd.linkname = kind, "/etc/passwd"
        archive.addfile(odd)
        info = tarfile.TarInfo("b.png")
        info.size = len(png(0))
        archive.addfile(info, io.BytesIO(png(0)))
    rows = read_tar(buffer.getvalue())
    assert bad(rows[0], "a.png", "only files are read")
    assert rows[0].sample.image == b""
    assert rows[1].image == png(0)


def test_members_over_the_limit_are_skipped_unread(read_tar, tar_bytes, png):
    large = bytes(3_000_000)
    rows = read_tar(tar_bytes([("a.png", large), ("b.png", png(0)), ("c.cls", large), ("c.png", png(1))]),
                    max_member_bytes=2000)  # fmt: skip
    assert bad(rows[0], "3000000 bytes", "source.max_member_bytes (2000)")
    assert rows[0].sample.image == b""
    assert rows[1].image == png(0)
    assert bad(rows[2], "cls")
    together = read_tar(tar_bytes([("a.cls", bytes(1500)), ("a.json", b" " * 1500)]), max_member_bytes=2000)
    assert bad(together[0], "together")


def test_names_that_leave_the_folder_are_only_labels(read_tar, tar_bytes, png, tmp_path):
    names = ["/etc/x.png", "../../up.png", "a/../b.png"]
    rows = read_tar(tar_bytes([(name, png(at)) for at, name in enumerate(names)]))
    assert keys(rows) == ["/etc/x", "../../up", "a/../b"]
    assert [path.name for path in tmp_path.iterdir()] == ["shard.tar"]


def test_a_file_without_extension_is_reported(read_tar, tar_bytes, png):
    rows = read_tar(tar_bytes([("img_0001", png(0)), ("b.png", png(1))]))
    assert bad(rows[0], "img_0001 has no extension")
    assert isinstance(rows[1], Sample)


@pytest.mark.parametrize(
    "document",
    [b"{no json", b"\xff\xfe{}", b'{"a": "\\ud800"}', b"[" * 100_000, b'{"edit": {"x": 1}, "edits": {"y": 2}}'],
)
def test_a_json_member_that_cannot_be_understood_fails_its_row_since_its_edit_may_stand_there(
    read_tar, tar_bytes, png, document
):
    rows = read_tar(tar_bytes([("a.json", document), ("a.png", png(0)), ("b.png", png(1))]))
    assert bad(rows[0], "member json")
    assert rows[0].sample.image == png(0)
    assert isinstance(rows[1], Sample)


def test_json_gives_columns_and_edits_under_the_named_key(read_tar, tar_bytes, png):
    def row(document, **settings):
        (found,) = read_tar(tar_bytes([("a.json", json.dumps(document).encode()), ("a.png", png(0))]), **settings)
        return found

    assert row({"edits": {"one": {}}, "x": float("nan")}).edits == {"one": {}}
    assert row({"edits": {"one": {}}, "x": float("nan")}).columns == {"x": None}
    assert row({"todo": {"concepts": []}, "edit": None}, edit="todo").edits == {"concepts": []}
    assert row({"edit": None}).edits is None
    assert row([1, 2]).columns == {"json": [1, 2]}


def test_a_caption_that_is_not_utf8_is_kept_readable_and_noted(read_tar, tar_bytes, png):
    (row,) = read_tar(tar_bytes([("a.png", png(0)), ("a.txt", b"caf\xe9")]))
    assert row.caption.startswith("caf")
    assert "byte 3" in row.columns["caption_error"]
    (row,) = read_tar(tar_bytes([("a.png", png(0)), ("a.alt", "\ufeff café \n".encode())]), caption="alt")
    assert row.caption == "café"


def test_an_empty_archive_is_one_empty_last_unit_and_an_empty_file_one_reported_row(tmp_path, tar_bytes, read_all):
    from pipeline.recipe import SourceConfig

    (tmp_path / "a.tar").write_bytes(tar_bytes([]))
    (tmp_path / "b.tar").write_bytes(b"")
    empty, nothing = read_all(SourceConfig(shards=(str(tmp_path),)))
    assert (empty.rows, empty.unit.is_last, empty.unit.start, empty.unit.stop) == ((), True, 0, 0)
    assert bad(nothing.rows[0], "the file is empty")
    assert nothing.unit.is_last


@pytest.mark.skipif(shutil.which("tar") is None, reason="written by GNU tar")
@pytest.mark.parametrize("format", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"])
def test_sparse_files_of_every_format_of_gnu_tar_are_told_by_their_name_and_their_neighbours_are_read(
    read_tar, png, tmp_path, format
):
    for key in "ac":
        (tmp_path / f"{key}.png").write_bytes(png(1))
    with open(tmp_path / "b.png", "wb") as file:  # its middle is a hole, which the archive leaves out
        file.write(png(2))
        file.seek(1 << 20)
        file.write(b"end")
    command = ["tar", "--create", "--sparse", *f"--format={format}".split(), "--file=-", "a.png", "b.png", "c.png"]
    data = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    if len(data) > 1 << 20:
        pytest.skip("a file system without holes")
    rows = read_tar(data)
    assert keys(rows) == ["a", "b", "c"]
    assert [row.image for row in rows if isinstance(row, Sample)] == [png(1), png(1)]
    assert "a sparse file" in rows[1].message


def pax(image: bytes, size: str) -> bytes:
    """A member x.png whose own header says that it has no bytes, behind pax records that say another size."""
    record = f" size={size}\n".encode()
    length = next(total for total in range(len(record), 99) if total == len(record) + len(str(total)))
    content = str(length).encode() + record
    blocks = b""
    for name, kind, said, data in (("pax", tarfile.XHDTYPE, len(content), content), ("x.png", b"0", 0, image)):
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, said
        blocks += info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)
    return blocks


@pytest.mark.parametrize("size", ["{}", "000{}"])
def test_a_size_in_pax_records_counts_before_that_of_the_header(read_tar, tar_bytes, png, size):
    rows = read_tar(pax(png(1), size.format(len(png(1)))) + tar_bytes([("y.png", png(2))]))
    assert keys(rows) == ["x", "y"]
    assert [row.image for row in rows] == [png(1), png(2)]


@pytest.mark.parametrize("size", ["-5", "+{}", " {}", "1_0", "many", "", "1e3", "\u0663"])
def test_a_size_in_pax_records_that_is_no_plain_number_is_damage(read_tar, tar_bytes, png, size):
    rows = read_tar(pax(png(1), size.format(len(png(1)))) + tar_bytes([("y.png", png(2))]))
    assert "a damaged extended header" in rows[0].message
    assert rows[-1].image == png(2)
    assert png(1) not in [row.image for row in rows if isinstance(row, Sample)]
