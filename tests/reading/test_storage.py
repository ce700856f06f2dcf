"""Storage: the same rows from S3 as from disk, and what wrong buckets and credentials say."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from s3fs import S3FileSystem

from pipeline.common.showing import describe, public_url
from pipeline.errors import SourceError
from pipeline.reading import listing, storage
from pipeline.reading.storage import is_transient, open_fs, source_error
from pipeline.reading.units import list_shards, unit_id
from pipeline.recipe import SourceConfig


@pytest.fixture(autouse=True)
def _fresh_s3(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(s3_server, tar_bytes, samples, png):
    folder = s3_server.bucket("faces")
    (folder / "raw").mkdir(exist_ok=True)
    (folder / "raw" / "0001.tar").write_bytes(tar_bytes(samples(7)))
    (folder / "raw" / "0002.tar").write_bytes(tar_bytes(samples(2))[:-10_000])
    (folder / "loose").mkdir(exist_ok=True)
    (folder / "loose" / "a.png").write_bytes(png(0))
    (folder / "loose" / "a.txt").write_bytes(b"hello")
    return folder


def of(units):
    """Units without what only the store knows."""
    return [replace(unit, shard_etag="") for unit in units]


@pytest.mark.parametrize("url", ["s3://faces/raw", "s3://faces/raw/*.tar", "s3://faces/raw/000{1..2}.tar"])
def test_s3_and_disk_give_equal_units(s3_server, bucket, read_all, url):
    local = read_all(SourceConfig(shards=(str(bucket / "raw"),)))
    remote = read_all(SourceConfig(shards=(url,), storage_options=s3_server.storage_options))
    assert of(remote) == of(local)
    assert all(unit.shard_etag for unit in remote)
    done = {unit_id("0001.tar", 0)}
    one = SourceConfig(shards=(url,), storage_options=s3_server.storage_options)
    assert read_all(one, committed=done) == [unit for unit in remote if unit.unit.id not in done]


def test_parquet_and_folders_are_read_from_s3(s3_server, bucket, read_all, png):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (bucket / "table").mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": [png(n) for n in range(9)]}), bucket / "table" / "x.parquet", row_group_size=4)
    for name in ("table", "loose"):
        local = read_all(SourceConfig(shards=(str(bucket / name),)))
        url = f"s3://faces/{name}"
        remote = read_all(SourceConfig(shards=(url,), storage_options=s3_server.storage_options))
        assert of(remote) == of(local)


def test_credentials_and_endpoint_come_from_the_environment(s3_server, bucket, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    assert [shard.path for shard in list_shards(SourceConfig(shards=("s3://faces/raw",)))] == ["0001.tar", "0002.tar"]


@pytest.mark.parametrize("url", ["s3://faces/raw", "s3://faces/raw/*.tar", "s3://faces/raw/0001.tar", "s3://faces"])
def test_a_wrong_secret_is_a_source_error_that_does_not_repeat_it(s3_server, bucket, url):
    options = {**s3_server.storage_options, "secret": "a-wrong-secret"}
    with pytest.raises(SourceError, match="access was refused") as caught:
        list_shards(SourceConfig(shards=(url,), storage_options=options))
    assert "a-wrong-secret" not in str(caught.value)
    assert s3_server.key not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://no-such-bucket/raw", "s3://no-such-bucket/*.tar", "s3://no-such-bucket"])
def test_a_missing_bucket_is_a_source_error_that_names_it(s3_server, bucket, url):
    with pytest.raises(SourceError, match=r"no-such-bucket.* does not exist"):
        list_shards(SourceConfig(shards=(url,), storage_options=s3_server.storage_options))


@pytest.mark.parametrize(("url", "words"), [("s3://faces/none", "does not exist"), ("s3://faces/*.tar", "no file")])
def test_nothing_under_a_prefix_is_a_source_error(s3_server, bucket, url, words):
    with pytest.raises(SourceError, match=words):
        list_shards(SourceConfig(shards=(url,), storage_options=s3_server.storage_options))


def test_absent_credentials_and_a_dead_endpoint_say_what_to_set(s3_server, monkeypatch):
    options = {"client_kwargs": s3_server.storage_options["client_kwargs"]}
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(SourceError, match="AWS_ACCESS_KEY_ID"):
        list_shards(SourceConfig(shards=("s3://faces/raw",), storage_options=options))
    unreachable = source_error(EndpointConnectionError(endpoint_url="http://host:1/x?signature=abc"), "s3://faces")
    assert "AWS_ENDPOINT_URL" in str(unreachable)
    assert "abc" not in str(unreachable)


def test_listing_is_tried_again_when_the_store_stumbles(tmp_path, tar_bytes, samples, monkeypatch):
    (tmp_path / "a.tar").write_bytes(tar_bytes(samples(1)))
    failures = [OSError(5, "try again"), TimeoutError()]
    original = listing.open_fs

    def opened(url, options):
        fs, root = original(url, options)

        class Stumbling:
            def __getattr__(self, name):
                return getattr(fs, name)

            def find(self, *args, **kwargs):
                if failures:
                    raise failures.pop()
                return fs.find(*args, **kwargs)

        return Stumbling(), root

    monkeypatch.setattr(listing, "open_fs", opened)
    assert [shard.path for shard in list_shards(SourceConfig(shards=(str(tmp_path),)))] == ["a.tar"]
    assert not failures


def test_what_may_pass_is_tried_again_and_what_is_final_is_not():
    import aiohttp

    passing = [
        OSError(5, "x"),
        ConnectionResetError(),
        TimeoutError(),
        aiohttp.ClientPayloadError("x"),
        ReadTimeoutError(endpoint_url="x"),
        EndpointConnectionError(endpoint_url="x"),
    ]
    final = [
        FileNotFoundError(),
        PermissionError(),
        OSError(28, "disk full"),
        NoCredentialsError(),
        ValueError(),
        SourceError("x"),
    ]
    assert [is_transient(error) for error in passing] == [True] * len(passing)
    assert [is_transient(error) for error in final] == [False] * len(final)


def test_attempts_wait_longer_each_time(monkeypatch):
    monkeypatch.undo()
    policy = storage.retrying()
    waits = [policy.wait(_state(number)) for number in range(1, 6)]
    assert waits[0] >= storage.FIRST_WAIT
    assert waits[3] > waits[0]
    assert max(waits) <= storage.LONGEST_WAIT + storage.FIRST_WAIT


def _state(number):
    class State:
        attempt_number = number

    return State()


def test_credentials_and_addresses_are_left_out_of_what_is_shown():
    assert public_url("https://me:secret@host/x.tar?X-Amz-Signature=1") == "https://host/x.tar"
    assert public_url("s3://faces/000?.tar") == "s3://faces/000?.tar"
    assert public_url("/data/a b#1.tar") == "/data/a b#1.tar"
    error = ValueError("bad https://u:p@host/a?sig=1 in <_io.BytesIO object at 0x7f00deadbeef>")
    assert describe(error) == "ValueError: bad https://host/a in (object)"
    assert "storage_options" not in repr(SourceConfig(shards=("x",), storage_options={"secret": "s"}))


@pytest.mark.timeout(30)  # a pipe that nobody writes to is waited for, for ever
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    fs, root = open_fs(f"file://{tmp_path}", {})
    for path in (f"{root}/pipe", f"{root}/link", "/dev/zero"):
        for read in (fs.cat_file, fs.open):
            with pytest.raises(OSError, match="a named pipe, a socket or a device, no file") as raised:
                read(path)
            assert not is_transient(raised.value)


def test_a_path_of_this_machine_takes_no_protocol(tmp_path):
    with pytest.raises(SourceError, match=r"no protocol to choose\. Check the address, and the storage_options"):
        open_fs(str(tmp_path), {"protocol": "s3"})
