"""What strangers' data, checkpoints and recipes may not do: run code, write elsewhere; and no secret leaks."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.parse
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.common.showing import describe, public_url
from pipeline.errors import RecipeError
from pipeline.models.loading import load_backbone
from pipeline.reading.storage import source_error
from pipeline.recipe import ModelConfig, load_recipe, recipe_from
from pipeline.running import driver
from tests.checkpoints import change, refused
from tests.edit_server import Reply, edit_server
from tests.runs import png, recipe_data, write_shards

ROOT = Path(__file__).parents[1]
CODE = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("jobs/*.py")])


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


# No code out of data ---------------------------------------------------------------------------------------------


def calls_in(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_runs_what_it_reads_is_called(path: Path) -> None:
    forbidden = {
        "eval",
        "exec",
        "pickle.load",
        "pickle.loads",
        "os.system",
        "yaml.load",
        "yaml.unsafe_load",
    }
    forbidden |= {"marshal.loads", "shelve.open", "joblib.load", "dill.loads", "cloudpickle.loads", "tempfile.mktemp"}
    imported = {
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
    for name, call in calls_in(path):
        assert name not in forbidden, f"line {call.lineno}"
        if name == "torch.load":
            assert "weights_only=True" in ast.unparse(call), f"line {call.lineno}"
        assert name.rpartition(".")[2] not in {"extractall", "extract"}, f"line {call.lineno}"
        for keyword in call.keywords:
            if keyword.arg in ("allow_pickle", "trust_remote_code", "shell"):
                assert isinstance(keyword.value, ast.Constant), f"line {call.lineno}"
                assert keyword.value.value is False, f"line {call.lineno}"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth", ".pkl"])
def test_pickled_weights_are_refused_and_not_opened(checkpoint: Path, tmp_path: Path, part: str, suffix: str) -> None:
    (weights,) = (checkpoint / part).glob("*.safetensors")
    weights.unlink()
    weights.with_suffix(suffix).write_bytes(pickle.dumps(Bomb(tmp_path / "owned")))
    refused(checkpoint, "pickled weights")
    assert not (tmp_path / "owned").exists()


def test_pickled_weights_beside_safe_ones_are_not_opened(checkpoint: Path, tmp_path: Path) -> None:
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pkl"):
            (checkpoint / part / name).write_bytes(pickle.dumps(Bomb(tmp_path / "owned")))
    load_backbone(ModelConfig(name=str(checkpoint)), device="cpu")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "config",
    ["unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"],
)
def test_remote_code_is_refused_in_every_part(checkpoint: Path, config: str) -> None:
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')")
    change(checkpoint / config, auto_map={"AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]})
    refused(checkpoint, "remote code")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_class_of_the_checkpoints_own_is_refused(checkpoint: Path, part: str) -> None:
    change(checkpoint / "model_index.json", **{part: ["evil", "Model"]})
    refused(checkpoint, "without custom code")


def test_a_chat_template_reaches_no_module(tiny_klein: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_klein, tmp_path / "model"))
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}"
    (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    refused(folder, "the chat template of tokenizer/ of the checkpoint cannot be used: SecurityError")


def test_yaml_that_builds_objects_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: !!python/object/apply:os.mkdir ['{tmp_path}/owned']\n")
    with pytest.raises(RecipeError):
        load_recipe(recipe)
    recipe.write_text("source: {shards: x}\nsink: {folder: y}\n")
    with pytest.raises(RecipeError):
        load_recipe(recipe, [f"run.seed=!!python/object/apply:os.mkdir ['{tmp_path}/owned']"])
    assert not (tmp_path / "owned").exists()


def edit(source: Path, out: Path, **sections: Any) -> Any:
    data = recipe_data(source, out, engine="local", max_failed_fraction=1.0)
    data["source"].update(sections)
    return driver.run(recipe_from(data), progress="off")


def test_pickles_in_a_data_set_stay_bytes(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "owned"))
    (tmp_path / "in").mkdir()
    array = io.BytesIO()
    np.save(array, np.array([Bomb(tmp_path / "owned")], dtype=object), allow_pickle=True)
    members = {
        "a.png": png(0),
        "a.pyd": bomb,
        "a.pickle": bomb,
        "a.pth": bomb,
        "a.npy": array.getvalue(),
        "b.png": bomb,
    }
    with tarfile.open(tmp_path / "in" / "s.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    summary = edit(tmp_path / "in", tmp_path / "out")
    assert (summary.done, summary.failed) == (2, 2)
    metadata = {"pandas": bomb, "ARROW:extension:name": b"arrow.py_extension_type", "ARROW:extension:metadata": bomb}
    pickled = pa.field("x", pa.binary(), metadata=metadata)
    table = pa.table([[png(0)], [bomb]], schema=pa.schema([("image", pa.binary()), pickled], metadata=metadata))
    (tmp_path / "table").mkdir()
    pq.write_table(table, tmp_path / "table" / "t.parquet")
    assert edit(tmp_path / "table", tmp_path / "out2").done == 2
    assert not (tmp_path / "owned").exists()


# Nothing elsewhere -----------------------------------------------------------------------------------------------


def test_archive_members_write_and_read_nothing_outside_the_runs_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "victim.png").write_bytes(png(7))
    names = ["../victim.png", str(tmp_path / "owned.png"), "../../owned.png", "a/../../owned.png"]
    with tarfile.open(tmp_path / "in" / "s.tar", "w") as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            data = png(number)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.png")
            link.type, link.linkname = kind, str(tmp_path / "victim.png")
            tar.addfile(link)
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    summary = edit(tmp_path / "in", tmp_path / "out")
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - before
    assert {path.parts[0] for path in made} == {"out"}
    assert all(".." not in path.parts for path in made)
    assert (tmp_path / "victim.png").read_bytes() == png(7)
    assert (summary.done, summary.failed) == (2 * len(names), 2 * 2)
    rows = [row for path in (tmp_path / "out" / "quarantine").iterdir() for row in pq.read_table(path).to_pylist()]
    assert {row["image"] for row in rows} == {b""}
    assert all("link" in row["message"] for row in rows)


def test_text_of_strangers_is_escaped_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    markup = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'"
    members = {
        "<b onclick=x>k.png": png(0),
        "<b onclick=x>k.txt": markup.encode(),
        "<b onclick=x>k.json": json.dumps(
            {"edit": {"source_prompt": markup, "concepts": [{"prompt": markup}]}}
        ).encode(),
        "z<i>.png": b"<u>no image</u>",
    }
    with tarfile.open(tmp_path / "in" / "<s>.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    edit(tmp_path / "in", tmp_path / "out")
    report = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;script&gt;alert(" in report
    for text in ("<script>alert", "<img src=x", "<b onclick", "z<i>", "<s>.tar"):
        assert text not in report


# No secret -------------------------------------------------------------------------------------------------------

SECRETS = {
    "secret": "PLANTED/secret+4711=a",
    "key": "PLANTEDKEY4712",
    "token": "PLANTED-token-4713",
    "password": "PLANTED@password:4714",
}
TRACES = tuple(form for text in SECRETS.values() for form in {text, urllib.parse.quote(text, safe="")})


def assert_no_trace(*texts: str | bytes | Path) -> None:
    for text in texts:
        files = [path for path in text.rglob("*") if path.is_file()] if isinstance(text, Path) else [text]
        for item in files:
            data = item.read_bytes() if isinstance(item, Path) else item
            data = data.encode() if isinstance(data, str) else data
            found = [trace for trace in TRACES if trace.encode() in data]
            assert not found, f"{found} in {item!r:.500}"


def command(folder: Path, recipe: dict[str, Any], *arguments: str, **environment: str) -> tuple[int, str]:
    """`shardedit ...` in a process of its own, temporary files in `folder`: exit code and all that it prints."""
    (folder / "temporary").mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments, str(folder / "recipe.yaml"), "--debug"],
        env={
            **clean,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "TMPDIR": str(folder / "temporary"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def s3_recipe(server: Any, out: str, **options: Any) -> dict[str, Any]:
    data = recipe_data("s3://secret-in", f"s3://secret-out/{out}", engine="local")
    given = {"client_kwargs": {"endpoint_url": server.endpoint}, **options}
    data["source"]["storage_options"] = data["sink"]["storage_options"] = given
    return data


def test_a_run_that_succeeds_leaves_no_trace_of_its_credentials(s3_server: Any, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", shards=1, rows=4)
    for shard in source.iterdir():
        shutil.copy(shard, s3_server.bucket("secret-in"))
    bucket = s3_server.bucket("secret-out")
    data = s3_recipe(s3_server, "run", key=s3_server.key, secret=s3_server.secret)
    code, printed = command(tmp_path / "given", data, "edit")
    assert code == 0, printed
    data = s3_recipe(s3_server, "environment")
    keys = {"AWS_ACCESS_KEY_ID": s3_server.key, "AWS_SECRET_ACCESS_KEY": s3_server.secret}
    code, more = command(
        tmp_path / "environment", data, "edit", **keys, AWS_SESSION_TOKEN="", HF_TOKEN=SECRETS["token"]
    )
    assert code == 0, more
    assert_no_trace(printed, more, bucket, tmp_path / "given" / "temporary", tmp_path / "environment" / "temporary")
    for secret in (s3_server.secret, s3_server.key):
        assert secret not in printed + more
        files = [path for path in bucket.rglob("*") if path.is_file()]
        assert len(files) > 10
        assert [path.name for path in files if secret.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("failure", ["credentials", "session token", "endpoint", "bucket"])
def test_a_run_that_fails_prints_no_credentials_not_even_with_debug(
    s3_server: Any, tmp_path: Path, failure: str
) -> None:
    given = {"key": SECRETS["key"], "secret": SECRETS["secret"]}
    if failure == "session token":
        given["token"] = SECRETS["token"]
    data = s3_recipe(s3_server, "run", **given)
    if failure == "endpoint":
        data["source"]["storage_options"] = {**given, "client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}}
    if failure == "bucket":
        data["source"]["shards"] = "s3://no-such-bucket/x"
    code, printed = command(tmp_path / "run", data, "edit")
    assert code == 1, printed
    assert "Error" in printed
    assert_no_trace(printed, tmp_path / "run" / "temporary")


@pytest.mark.parametrize(
    "url", ["ftp://me:{password}@127.0.0.1:9/x", "http://me:{password}@127.0.0.1:9/x.tar?sig={token}"]
)
def test_credentials_in_an_address_are_printed_by_no_error(tmp_path: Path, url: str) -> None:
    address = url.format(**{name: urllib.parse.quote(text, safe="") for name, text in SECRETS.items()})
    code, printed = command(tmp_path / "run", recipe_data(address, tmp_path / "out", engine="local"), "edit")
    assert code == 1, printed
    assert_no_trace(printed, tmp_path / "run" / "temporary")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def test_a_presigned_address_is_read_and_its_signature_stands_nowhere(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", shards=2, rows=2)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "in"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        names = sorted(path.name for path in (tmp_path / "in").iterdir())
        signed = [f"http://127.0.0.1:{server.server_port}/{name}?X-Amz-Signature=PLANTED-token-4713" for name in names]
        data = recipe_data("", tmp_path / "out", engine="local")
        data["source"]["shards"] = signed
        code, printed = command(tmp_path / "run", data, "edit")
        server.shutdown()
    assert code in (0, 3), printed
    assert_no_trace(printed, tmp_path / "out", tmp_path / "run" / "temporary")
    assert [path for path, *_ in json.loads((tmp_path / "out" / "run.json").read_text())["input"]] == names


def test_a_misspelt_recipe_does_not_repeat_its_storage_options(tmp_path: Path) -> None:
    data = recipe_data("s3://x", "s3://y")
    data["source"]["storage_option"] = {"secret": SECRETS["secret"]}
    data["sink"]["storage_options"] = f"secret={SECRETS['secret']}"
    code, printed = command(tmp_path / "run", data, "edit")
    assert code == 2
    assert "storage_option" in printed
    assert_no_trace(printed)


def test_credentials_reach_no_file_and_no_log_of_ray(s3_server: Any, tmp_path: Path) -> None:
    """The recipe travels to the workers; its secrets stand neither in Ray's logs nor in the runtime environment."""
    shards = write_shards(tmp_path / "in", shards=1, rows=2)
    for shard in shards.iterdir():
        shutil.copy(shard, s3_server.bucket("secret-in"))
    data = s3_recipe(s3_server, "ray", key=s3_server.key, secret=s3_server.secret)
    data["run"]["engine"] = "ray"
    script = (
        "import json, sys, ray\n"
        "from pipeline.running import driver\n"
        "from pipeline.recipe import load_recipe\n"
        "ray.init(address='local', num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[2])\n"
        "driver.run(load_recipe(sys.argv[1]), progress='off')\n"
        "print(json.dumps(dict(ray.get_runtime_context().runtime_env)))\n"
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    logs = Path(os.environ.get("TMPDIR", "/tmp")) / f"sec-{os.getpid()}"  # short: Ray's sockets lie below it
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "recipe.yaml"), str(logs)],
            env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        files = [path for path in logs.rglob("*") if path.is_file()]
        assert len(files) > 5
        for secret in (s3_server.secret, s3_server.key):
            assert secret not in done.stdout + done.stderr
            assert [path.name for path in files if secret.encode() in path.read_bytes()] == []
    finally:
        shutil.rmtree(logs, ignore_errors=True)


def test_the_key_of_a_server_that_edits_is_printed_by_no_error_and_written_nowhere(tmp_path: Path) -> None:
    """Not even where the server says it back."""
    write_shards(tmp_path / "in", shards=1, rows=1, damaged=())
    echo = json.dumps({"error": {"message": f"no such key: {SECRETS['token']}"}}).encode()
    with edit_server(lambda *_: Reply(status=401, body=echo)) as server:
        data = recipe_data(tmp_path / "in", tmp_path / "out", engine="local")
        data |= {"edits": {"instruction": "a hat"}, "model": {"name": "none", "size": 32}}
        data |= {"inversion": {"method": "noise", "num_steps": 1}}
        data |= {"editing": {"method": "endpoint", "model": "m", "base_url": server.url}}
        code, printed = command(tmp_path / "run", data, "edit", EDIT_API_KEY=SECRETS["token"])
        assert server.headers[0]["Authorization"] == f"Bearer {SECRETS['token']}"
    assert code == 1, printed
    assert "no such key: (key)" in printed
    assert_no_trace(printed, tmp_path / "out", tmp_path / "run")


@pytest.mark.parametrize("secret", SECRETS.values())
def test_what_is_shown_of_an_address_or_an_error_holds_no_credentials(secret: str) -> None:
    quoted = urllib.parse.quote(secret, safe="")
    urls = [f"s3://key:{quoted}@bucket/x", f"https://u:{quoted}@host/x?X-Amz-Signature={quoted}", f"ftp://{quoted}@h/x"]
    for url in urls:
        assert_no_trace(
            public_url(url), describe(ValueError(f"cannot open {url}")), str(source_error(OSError(url), url))
        )
