"""Damaged archives and tables: what is readable is read, what is not is reported with its place, nothing is made up."""

from __future__ import annotations

import io
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.reading import parquet
from pipeline.reading.tar import Damage, Entry, Stream, TarWalk
from pipeline.reading.webdataset import read_rows
from pipeline.recipe import SourceConfig
from pipeline.samples import Sample, Unreadable

SOURCE = SourceConfig(shards=("nowhere",))


def rows_in(data):
    return read_rows(
        io.BytesIO(data),
        shard="s",
        url="s.tar",
        size=len(data),
        source=SOURCE,
        wants=lambda _: True,
        sized=lambda _: None,
    )


def rows_of(data):
    return list(rows_in(data))


def headers(data):
    """Offset of every member's header, by name."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: member.offset for member in archive}


def with_bytes(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def outcome(rows):
    good = {row.key: row for row in rows if isinstance(row, Sample)}
    reported = [row for row in rows if isinstance(row, Unreadable)]
    return good, reported


@pytest.mark.parametrize("member", ["0003.json", "0003.png", "0003.txt"])
def test_a_damaged_header_costs_its_sample_and_no_other(tar_bytes, samples, member):
    data = tar_bytes(samples(8))
    at = headers(data)[member]
    good, reported = outcome(rows_of(with_bytes(data, at, b"\xff" * 40)))
    assert sorted(good) == [f"{number:04d}" for number in range(8) if number != 3]
    places = [row for row in reported if row.sample.key == f"@{at}"]
    assert len(places) == 1
    assert f"byte {at}" in places[0].message
    assert {row.sample.key for row in reported} == {f"@{at}", "0003"}


@pytest.mark.parametrize("zeros", [512, 1024, 20 * 512])
def test_zeros_in_the_middle_are_no_end(tar_bytes, samples, zeros):
    data = tar_bytes(samples(8))
    at = headers(data)["0002.json"]
    good, reported = outcome(rows_of(with_bytes(data, at, bytes(zeros))))
    assert {"0000", "0001", "0006", "0007"} <= set(good)
    assert f"@{at}" in {row.sample.key for row in reported}


def test_archives_joined_end_to_end_are_read_whole_and_the_joint_is_reported(tar_bytes, png):
    data = tar_bytes([("a.png", png(0))]) + tar_bytes([("b.png", png(1))])
    good, reported = outcome(rows_of(data))
    assert {key: row.image for key, row in good.items()} == {"a": png(0), "b": png(1)}
    assert len(reported) == 1


def test_a_cut_end_keeps_the_whole_samples_before_and_names_the_byte(tar_bytes, samples):
    data = tar_bytes(samples(6))
    at = headers(data)
    inside = at["0004.png"] + 512 + 20
    good, reported = outcome(rows_of(data[:inside]))
    assert sorted(good) == ["0000", "0001", "0002", "0003"]
    assert {row.sample.key for row in reported} == {"0004", f"@{inside}"}
    assert all(f"{inside}" in row.message or "0004.png" in row.message for row in reported)
    # Between two members of one sample: it lacks what its neighbours have, and may have lost its edit request.
    good, reported = outcome(rows_of(data[: at["0004.txt"]]))
    assert sorted(good) == ["0000", "0001", "0002", "0003"]
    assert {row.sample.key for row in reported} == {"0004", f"@{at['0004.txt']}"}
    # Inside the sample's last member: nothing but the cut tells that it is not whole.
    good, reported = outcome(rows_of(data[: at["0004.txt"] + 512 + 3]))
    assert sorted(good) == ["0000", "0001", "0002", "0003"]
    assert "cut inside member '0004.txt'" in reported[0].message
    assert reported[0].sample.caption == ""
    # Between two samples.
    good, reported = outcome(rows_of(data[: at["0004.json"]]))
    assert sorted(good) == ["0000", "0001", "0002", "0003"]
    assert [row.sample.key for row in reported] == [f"@{at['0004.json']}"]


def test_a_missing_half_of_the_end_marker_is_reported(tar_bytes, samples):
    data = tar_bytes(samples(2))
    end = headers(data)["0001.txt"] + 1024
    assert not outcome(rows_of(data[: end + 1024]))[1]
    for length in (0, 100, 512, 700):
        good, reported = outcome(rows_of(data[: end + length]))
        assert sorted(good) == ["0000", "0001"]
        assert [row.sample.key for row in reported] == [f"@{end}"]


def test_what_is_no_archive_is_one_reported_row():
    for data in (b"hello", b"x" * 5000, random.Random(0).randbytes(20_000)):
        (row,) = rows_of(data)
        assert row.sample.key == "@0"
        assert isinstance(row, Unreadable)


def test_a_cut_gzip_stream_keeps_what_was_unpacked(tar_bytes, png):
    import gzip

    members = [(f"{number:04d}.png", png(number, 60, 60)) for number in range(20)]
    packed = gzip.compress(tar_bytes(members))
    for damaged in (packed[: len(packed) // 2], with_bytes(packed, len(packed) // 2, b"\x00" * 50)):
        good, reported = outcome(rows_of(damaged))
        assert len(good) >= 5
        originals = dict(members)
        # A packed stream has no checksum before its end: only what was cut is certain to be told.
        assert reported
        if len(damaged) < len(packed):
            assert all(row.image == originals[f"{key}.png"] for key, row in good.items())


def test_a_name_is_not_trusted_where_its_long_form_was_damaged(tar_bytes, png):
    long = "/".join(["folder"] * 30)
    for kind, label in ((tarfile.GNU_FORMAT, long), (tarfile.PAX_FORMAT, long), (tarfile.PAX_FORMAT, "ä")):
        members = [(f"{label}/{number}.png", png(number)) for number in range(4)]
        data = tar_bytes(members, kind=kind)
        at = headers(data)[members[1][0]]
        good, reported = outcome(rows_of(with_bytes(data, at, b"\xff" * 100)))
        assert set(good) == {name[:-4] for name, _ in (members[0], members[2], members[3])}
        assert [row.sample.key for row in reported] == [f"@{at}"]


def test_messages_do_not_depend_on_the_run(tar_bytes, samples):
    data = tar_bytes(samples(5))
    damaged = with_bytes(data, headers(data)["0002.json"], b"\xff" * 9)
    assert rows_of(damaged) == rows_of(damaged)


def test_nothing_is_held_but_one_sample(tar_bytes):
    """A 64 MB archive passes through with a few MB of memory."""
    import tracemalloc

    member = bytes(1 << 20)
    data = tar_bytes((f"{number:04d}.png", member) for number in range(64))
    tracemalloc.start()
    rows = rows_in(data)
    count = sum(1 for _ in rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 64
    assert peak < 8 << 20


def _uniform(count):
    """Members of `count` samples whose content tells its sample, so that a mix-up shows."""
    rng = random.Random(1)
    return [
        (f"{number:03d}.{part}", f"{number}:{part}:".encode() + rng.randbytes(rng.randrange(1500)))
        for number in range(count)
        for part in ("cls", "png", "txt")
    ]


@st.composite
def _damages(draw):
    kind = draw(st.sampled_from(["flip", "overwrite", "zero", "cut", "insert", "delete"]))
    return kind, draw(st.integers(0, 10**6)), draw(st.integers(1, 4000)), draw(st.integers(0, 2**32))


def _apply(data, damage):
    kind, place, length, seed = damage
    at = place % len(data)
    length = min(length, len(data) - at)
    noise = random.Random(seed).randbytes(length)
    match kind:
        case "flip":
            return with_bytes(data, at, bytes([data[at] ^ (1 + seed % 255)])), at, at + 1
        case "overwrite":
            return with_bytes(data, at, noise), at, at + length
        case "zero":
            return with_bytes(data, at, bytes(length)), at, at + length
        case "cut":
            return data[:at], at, len(data)
        case "insert":
            return data[:at] + noise + data[at:], at, len(data)
        case _:
            return data[:at] + data[at + length :], at, len(data)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@example(damage=("delete", 1536, 3072, 0), kind=tarfile.GNU_FORMAT)
@given(damage=_damages(), kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_whatever_is_damaged_intact_samples_stay_right_and_every_loss_is_told(tar_bytes, damage, kind):
    members = _uniform(8)
    original = tar_bytes(members, kind=kind)
    content = dict(members)
    offsets = headers(original)
    damaged, first, after = _apply(original, damage)

    good, reported = outcome(rows_of(damaged))

    assert len(good) + len(reported) <= 60
    spans = {f"{n:03d}": (offsets[f"{n:03d}.cls"], offsets.get(f"{n + 1:03d}.cls", None)) for n in range(8)}
    for key, (start, stop) in spans.items():
        stop = stop or offsets[f"{key}.txt"] + 512 + -(-len(content[f"{key}.txt"]) // 512) * 512
        untouched = stop <= first or (start >= after and damage[0] in ("flip", "overwrite", "zero"))
        if untouched:
            assert good[key].image == content[f"{key}.png"]
            assert good[key].members == {"cls": content[f"{key}.cls"]}
        elif key in good:
            row = good[key]
            # What carries no checksum, the content, may have changed inside the damaged bytes, and only there. A byte
            # too many or too few that keeps the blocks in step does the same to what follows in this member.
            for part, data in (("png", row.image), ("cls", row.members.get("cls"))):
                begin = offsets[f"{key}.{part}"] + 512
                if data is None:  # cut out in whole blocks, header and all, which leaves no trace
                    assert damage[0] == "delete"
                    assert first <= begin - 512 < begin <= first + damage[2]
                    continue
                expected = content[f"{key}.{part}"]
                assert len(data) == len(expected)
                keep = max(0, min(first - begin, len(expected)))
                assert data[:keep] == expected[:keep]
                if damage[0] in ("flip", "overwrite", "zero"):
                    rest = max(0, min(after - begin, len(expected)))
                    assert data[rest:] == expected[rest:]
        else:
            assert reported
    lost_headers = [name for name, at in offsets.items() if at < after and at + 512 > first]
    if damage[0] != "flip" and lost_headers and damaged[first:after] != original[first:after]:
        assert reported or len(good) == 8


def test_the_walk_tells_every_entry_with_its_place(tar_bytes, png):
    data = tar_bytes([("a.png", png(0)), ("b.png", png(1))])
    walk = TarWalk(Stream(io.BytesIO(data), len(data), packed=False))
    assert [item for item in walk if isinstance(item, Damage)] == []
    walk = TarWalk(Stream(io.BytesIO(data), len(data), packed=False))
    assert [(item.name, item.offset) for item in walk if isinstance(item, Entry)] == list(headers(data).items())


def _with_checksum(block):
    blank = with_bytes(block, 148, b" " * 8)
    return with_bytes(blank, 148, b"%06o\0 " % sum(blank))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    member=st.integers(3, 17),
    place=st.integers(0, 511),
    new=st.one_of(
        st.binary(min_size=1, max_size=40), st.sampled_from([b"77777777777", b"\x80" + b"\xff" * 11, b"x", b"g"])
    ),
    kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_a_header_that_lies_with_the_right_checksum_costs_nothing_before_it_and_ends(
    tar_bytes, member, place, new, kind
):
    members = _uniform(6)
    original = tar_bytes(members, kind=kind)
    at = headers(original)[members[member][0]]
    place = min(place, 512 - len(new))
    block = _with_checksum(with_bytes(original[at : at + 512], place, new))
    rows = rows_of(with_bytes(original, at, block))
    good, _ = outcome(rows)
    content = dict(members)
    for number in range(member // 3):
        assert good[f"{number:03d}"].image == content[f"{number:03d}.png"]
    ids = [row.id if isinstance(row, Sample) else row.sample.id for row in rows]
    assert len(set(ids)) == len(ids) <= 40
    for row in good.values():
        assert len(row.image) <= len(original)


def _table_rows(data):
    def wanted(_):
        return True

    return list(parquet.read_rows(lambda: io.BytesIO(data), shard="s", start=0, stop=None, source=SOURCE, wants=wanted))


def _table_bytes(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=5, data_page_size=600, write_page_checksum=False)
    return buffer.getvalue()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(damage=_damages())
def test_whatever_is_damaged_in_a_table_its_rows_come_once_in_order_or_it_is_told_as_a_whole(damage):
    images = [random.Random(number).randbytes(400) for number in range(20)]
    original = _table_bytes(image=images, id=[f"r{number}" for number in range(20)])
    damaged, _, _ = _apply(original, damage)
    rows = _table_rows(damaged)
    samples = [row.sample if isinstance(row, Unreadable) else row for row in rows]
    assert [sample.index for sample in samples] == list(range(len(rows)))
    if len(rows) == 1 and isinstance(rows[0], Unreadable):
        assert "cannot be read" in rows[0].message
        return
    # A damaged footer may claim other counts; what the file then says of itself is read or told row by row.
    assert rows or damaged != original
    if damaged == original:
        assert [sample.image for sample in samples] == images


@settings(max_examples=200, deadline=None)
@given(keys=st.lists(st.sampled_from(["x", "x#1", "x#2", "x#1#2", "", None, "00000000", "00000001"]), min_size=1))
def test_rows_of_a_table_have_ids_of_their_own_whatever_their_keys(keys):
    data = _table_bytes(image=pa.array([b"x"] * len(keys)), id=pa.array(keys, pa.string()))
    ids = [row.id for row in _table_rows(data)]
    assert len(set(ids)) == len(keys)
