"""What is shown of addresses, errors and strangers' text."""

from __future__ import annotations

import io
import logging

import pytest
from rich.table import Table

from pipeline.common.showing import describe, printable, public_url, without_credentials
from pipeline.errors import RecipeError, SourceError
from pipeline.looking.printing import PlainConsole, PlainFormatter
from pipeline.reading.storage import open_fs
from pipeline.recipe import load_recipe, recipe_from

SECRETS = ("PLANTED", "PLAN/TED+1=", "PLAN@TED", "PLAN:TED/x@y", "PLAN?TED")


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:{}@bucket/x.tar",
        "s3://KEY:{}@bucket",
        "ftp://me:{}@host:21/x",
        "https://me:{}@host/x.tar?X-Amz-Signature={}",
        "simplecache::s3://KEY:{}@bucket/x",
    ],
)
def test_a_password_in_an_address_is_not_shown_whatever_letters_it_has(url: str, secret: str) -> None:
    address = url.format(secret, secret)
    shown = [public_url(address), without_credentials(f"cannot open {address} now"), describe(OSError(address))]
    for text in shown:
        assert not [part for part in (secret, "KEY", "TED", "me:") if part in text], text
        assert "//bucket" in text or "//host" in text or "?" in secret


@pytest.mark.parametrize("scheme", ["https", "s3", "gs", "abfs"])
def test_a_query_is_not_shown_whatever_the_scheme(scheme: str) -> None:
    address = f"{scheme}://bucket/x.tar?X-Amz-Signature=PLANTED&a=b"
    assert public_url(address) == f"{scheme}://bucket/x.tar"
    assert without_credentials(f"at {address}, twice: {address}") == (
        f"at {scheme}://bucket/x.tar twice: {scheme}://bucket/x.tar"
    )


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/00?.tar",
        "s3://bucket/a@b/c:d.tar",
        "http://host:8080/a@b.tar",
        "/data/a?b=c@d:e.tar",
        "s3://b/?/x",
        "http://[::1]:80/x",
    ],
)
def test_what_is_no_secret_stays(url: str) -> None:
    assert public_url(url) == url


def test_a_password_for_a_store_that_does_not_read_it_from_there_is_refused_in_words() -> None:
    with pytest.raises(SourceError, match=r"s3://bucket/x .*environment") as refusal:
        open_fs("s3://KEY:PLAN/TED@bucket/x", {})
    assert "PLAN" not in str(refusal.value)
    assert "KEY:" not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "sink: {storage_options: {secret: PLANTED\n",
        "sink: {secret: 'PLANTED\n",
        "secret: *PLANTED\n",
        "secret: !PLANTED x\n",
        "secret: PLANTED: x\n",
        'secret: "PLANTED\\q"\n',
        "secret:\tPLANTED\n\t- x",
    ],
)
def test_a_recipe_that_is_no_yaml_is_told_by_its_line_and_never_repeated(tmp_path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    for arguments in ([path], [path, ["sink.secret=" + text]]):
        with pytest.raises(RecipeError, match=r"line \d+, column \d+") as refusal:
            load_recipe(*arguments)
        assert "PLANTED" not in str(refusal.value)
        assert refusal.value.__cause__ is None  # nor by the traceback of --debug
        path.write_text("source: {shards: x}")


def test_an_override_without_a_value_is_named_by_its_place(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text("source: {shards: x}\nsink: {folder: y}")
    with pytest.raises(RecipeError, match="override 2: is not written") as refusal:
        load_recipe(tmp_path / "recipe.yaml", ["run.seed=1", "sink.storage_options.secret:PLANTED"])
    assert "PLANTED" not in str(refusal.value)


def test_a_presigned_address_of_tomorrow_is_the_same_run() -> None:
    def recipe(signature: str):
        shards = f"https://host/x.tar?X-Amz-Signature={signature}"
        return recipe_from({"source": {"shards": shards}, "sink": {"folder": "y"}})

    assert recipe("SIGNED1").hash == recipe("SIGNED2").hash
    assert "SIGNED" not in str(recipe("SIGNED1").result_settings())


def test_an_error_is_told_without_the_addresses_that_differ_from_run_to_run() -> None:
    error = ValueError("cannot identify <_io.BytesIO object at 0x7f3a12345678>,\n read at 0x55d0c0ffee10, code 0x1f")
    assert describe(error) == "ValueError: cannot identify (object), read at (object), code 0x1f"


STRANGE = "k\x1b[31m\x07\x9b2J\u202e\rx\x00"
SHOWN = "k\\x1b[31m\\x07\\x9b2J\\u202e\\x0dx\\x00"


def test_control_characters_are_shown_as_escapes_and_other_scripts_as_they_are() -> None:
    assert printable(STRANGE) == SHOWN
    assert printable("a\n\tb é 猫 👩\u200d🚀 שלום") == "a\n\tb é 猫 👩\u200d🚀 שלום"
    assert printable("\ud800") == "\\ud800"


def test_no_print_table_title_or_log_line_sends_them_to_a_terminal() -> None:
    sent = io.StringIO()
    console = PlainConsole(file=sent, highlight=False, soft_wrap=True)
    console.print(STRANGE, markup=False)
    table = Table(title=STRANGE)
    table.add_column(STRANGE)
    table.add_row(STRANGE)
    console.print(table)
    record = logging.LogRecord("pipeline", logging.WARNING, "", 1, "%s at s3://K:PLANTED@b", (STRANGE,), None)
    sent.write(PlainFormatter().format(record))
    assert sent.getvalue().count(SHOWN) == 5
    assert not [char for char in sent.getvalue() if ord(char) < 32 and char != "\n"]
    assert "PLANTED" not in sent.getvalue()
