"""A campaign of faults: every run is hit at a random moment, started again with the same command, and compared.

    python -m benchmarks.faults [--seed 0] [--only "raylet killed"]

Each run edits a small dataset with the closed-form model, which waits a little in every unit so that there is something
to interrupt. Compared with an undisturbed run is what stands in the run's folder: every (image, edit, method) once, and
every byte. Writes build/faults.json. Needs rclone (in the extra `dev`); servers and Ray listen on loopback only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from rich.console import Console
from rich.table import Table

from pipeline.recipe import Recipe, SinkConfig
from pipeline.runs import find_run
from pipeline.verify import verify
from tests.runs import asked, contents, recipe_data, results, write_shards
from tests.servers import S3Server, s3_server

BUILD = Path("build")
SHARDS, ROWS, UNIT_SIZE = 4, 6, 2
UNITS = SHARDS * ROWS // UNIT_SIZE
# Children of a process that has imported everything: torch and Ray take seconds, of every run and every rerun.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = [
    "benchmarks.faults",
    "pipeline.on_ray",
    "pipeline.worker",
    "pipeline.evaluation.report",
    "s3fs",
    "ray.data",
]
# Ray commits in bursts of what its two workers have at work: longer units, or a fault would find all of them edited.
SECONDS_PER_UNIT = {"local": 0.15, "ray": 1.0}
AT_ONCE = {"local": 1, "ray": 4}  # units at work: so many are left when the latest fault strikes
S3_FAULT_RATE = 0.2
PATIENCE_S = 180.0  # a run that takes longer hangs

# (runs, where they run, what hits them). "local": one process. "ray": a local Ray, two workers. "nodes": a Ray cluster
# of two nodes, where a new node comes after one is lost. "+s3": input and output in a bucket.
CAMPAIGN: tuple[tuple[int, str, tuple[str, ...]], ...] = (
    (2, "nodes", ("raylet killed",)),
    (1, "nodes", ("raylet killed", "worker killed")),
    (2, "ray", ("worker killed",)),
    (1, "ray", ("driver killed",)),
    (3, "local+s3", ("S3 errors",)),
    (3, "local+s3", ("cut bodies",)),
    (2, "local+s3", ("S3 errors", "driver killed")),
    (2, "local+s3", ("cut bodies", "driver killed")),
    (1, "ray+s3", ("S3 errors", "worker killed")),
    (10, "local", ("driver killed",)),
    (4, "local", ("disk full",)),
    (4, "local", ("disk full", "driver killed")),
)


# What a run's own processes do -----------------------------------------------------------------------------------


def witness(notes: str, seconds_per_unit: float) -> Callable[[], None]:
    """What every process of a run does first: note each unit that is begun, wait, and find the disk full when told."""

    def install() -> None:  # nested, so that it travels by value
        import json
        import os
        import time

        import pipeline.on_ray

        edit, fsync = pipeline.on_ray.EditWorker.__call__, os.fsync

        def begin(unit: str) -> None:
            with open(f"{notes}/events", "a") as file:
                file.write(json.dumps([unit, os.getpid()]) + "\n")
            time.sleep(seconds_per_unit)

        def noted_edit(self: Any, batch: Any) -> Any:
            begin(json.loads(batch["unit"][0].as_py())["unit"]["id"])
            return edit(self, batch)

        def full_fsync(file: Any) -> None:
            if os.path.exists(f"{notes}/disk-full"):
                raise OSError(28, "No space left on device")
            fsync(file)

        pipeline.on_ray.EditWorker.__call__ = noted_edit  # type: ignore[method-assign]
        os.fsync = full_fsync
        pipeline.on_ray.begin_unit = begin  # type: ignore[attr-defined]

    return install


def drive(notes: Path, place: str) -> None:
    """What a run's own process does: as `shardedit edit`, with a cluster of its own. Ends with the exit code."""
    with open(notes / "log", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.exit(edit(notes, place))


def edit(notes: Path, place: str) -> int:
    """Edit; returns the exit code."""
    import pipeline.cluster
    import pipeline.on_ray
    from pipeline.recipe import load_recipe

    recipe = load_recipe(notes / "recipe.json")
    install = witness(str(notes), SECONDS_PER_UNIT[engine_of(place)])
    if place.startswith("local"):
        from pipeline.worker import Worker

        install()
        finish = Worker.finish

        def noted_finish(self: Any, unit_input: Any, *args: Any) -> Any:
            pipeline.on_ray.begin_unit(unit_input.unit.id)  # type: ignore[attr-defined]
            return finish(self, unit_input, *args)

        Worker.finish = noted_finish  # type: ignore[method-assign]
        return pipeline.cluster.run(recipe, progress="off").exit_code

    import ray

    settings: dict[str, Any] = {"log_to_driver": False, "runtime_env": {"worker_process_setup_hook": install}}
    with ExitStack() as stack:
        if not pipeline.cluster.find_todo(recipe).tasks:
            pass  # as the command itself: nothing is started for nothing
        elif place.startswith("nodes"):
            return edit_on_two_nodes(notes, recipe, settings)
        else:
            loopback = {"_node_ip_address": "127.0.0.1"}
            ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, **loopback, **settings)
        stack.callback(ray.shutdown)
        return pipeline.cluster.run(recipe, progress="off").exit_code


def edit_on_two_nodes(notes: Path, recipe: Recipe, settings: dict[str, Any]) -> int:
    """Edit on a head and a node, which another one replaces when it is lost; returns the exit code."""
    import ray
    from ray.cluster_utils import Cluster

    import pipeline.cluster

    # One CPU on the head: at least one of two workers is on the node that is killed.
    # Loopback, but not 127.0.0.1, for which Ray would put the machine's outer address.
    common = {"num_gpus": 0, "node_ip_address": "127.0.0.2", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **common})
    raylet = cluster.add_node(num_cpus=2, **common).all_processes["raylet"][0].process
    (notes / "raylet").write_text(str(raylet.pid))
    ray.init(address=cluster.address, **settings)
    try:
        with ThreadPoolExecutor(1) as pool:  # nodes can only be added from the main thread
            summary = pool.submit(pipeline.cluster.run, recipe, progress="off")
            while not summary.done() and raylet.poll() is None:
                time.sleep(0.05)
            if wait([summary], timeout=1.0).not_done:
                cluster.add_node(num_cpus=2, **common)
            return summary.result().exit_code
    finally:
        ray.shutdown()
        for node in cluster.list_all_nodes():  # a polite end would drain each for half a minute
            node.kill_all_processes(check_alive=False, allow_graceful=False)


# Faults ----------------------------------------------------------------------------------------------------------


class FaultyProxy(ThreadingHTTPServer):
    """Stands before an S3 server and spoils a share of the requests. Signatures stay valid: nothing is changed."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.kinds: tuple[str, ...] = ()  # what may happen; nothing by default
        self.random = random.Random(0)
        self.spoiled = 0
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.server_port}"

    def draw(self) -> str:
        """What happens to the next request; "" for nothing."""
        with self._lock:
            if not self.kinds or self.random.random() >= S3_FAULT_RATE:
                return ""
            self.spoiled += 1
            kind = self.random.choice(self.kinds)
            return self.random.choice(("error", "reset")) if kind == "S3 errors" else "cut"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed leaves broken connections behind: no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.draw()
        if fault == "error":
            text = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self._answer(503, [("Content-Type", "application/xml")], text, len(text))
        elif fault == "reset":
            self.close_connection = True
        else:
            status, headers, data, announced = self._ask(body)
            if fault == "cut" and not data:  # as with a put: the server has it, and the client is never told
                self.close_connection = True
            else:
                self._answer(status, headers, data[: len(data) // 2] if fault == "cut" else data, announced)
                self.close_connection = self.close_connection or fault == "cut"

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815  names that http.server looks for

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes, int]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            data = response.read()
            announced = int(response.headers.get("Content-Length") or len(data))
            own = ("content-length", "transfer-encoding", "connection", "date", "server")
            return response.status, [(k, v) for k, v in response.getheaders() if k.lower() not in own], data, announced
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, announced: int) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@contextmanager
def faulty_s3(root: Path) -> Iterator[tuple[S3Server, FaultyProxy]]:
    """An S3 server and the proxy before it."""
    with s3_server(root) as server, FaultyProxy(server.endpoint) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield server, proxy
        finally:
            proxy.shutdown()


# Runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What all runs of a campaign share."""

    folder: Path
    server: S3Server
    proxy: FaultyProxy
    calm: dict[str, Any] = field(default_factory=dict)  # what an undisturbed run writes, by storage
    calm_seconds: dict[str, float] = field(default_factory=dict)  # by place

    def new_run(self, name: str, place: str) -> Run:
        """Everything of a run but its process."""
        notes = self.folder / "notes" / name
        notes.mkdir(parents=True)
        if place.endswith("+s3"):
            source, out, where = "s3://in", f"s3://out/{name}", self.server.bucket("out") / name
        else:
            source, out, where = str(self.folder / "in"), str(self.folder / name), self.folder / name
        engine = engine_of(place)
        recipe = recipe_data(source, out, engine=engine, workers=1 if engine == "local" else 2)
        (notes / "recipe.json").write_text(json.dumps(recipe))
        return Run(notes, where, place)


@dataclass
class Run:
    """One run's folders, and its command."""

    notes: Path
    out: Path  # as a folder of this machine, also where it is a bucket's
    place: str

    def start(self) -> BaseProcess:
        """A process that edits."""
        process = PROCESSES.Process(target=drive, args=(self.notes, self.place))
        process.start()
        return process

    @property
    def commits(self) -> int:
        """Units that are committed."""
        return len(list((self.out / "_units").glob("*/*.json")))

    def events(self) -> list[tuple[str, int]]:
        """(unit, process) for every unit that was begun, in order."""
        path = self.notes / "events"
        return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def finish(process: BaseProcess, family: list[psutil.Process]) -> int | None:
    """Wait for a run's end; None for one that hangs. What it started and left behind is ended, process by process."""
    process.join(PATIENCE_S)
    if hangs := process.is_alive():
        family += children_of(process)
        process.kill()
        process.join()
    _, left = psutil.wait_procs(family, timeout=10)
    for one in left:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    return None if hangs else process.exitcode


def children_of(process: BaseProcess) -> list[psutil.Process]:
    """All that a run has started."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def strike(fault: str, run: Run, process: BaseProcess) -> bool:
    """Do it; false where there was nothing left to hit."""
    if fault == "disk full":
        (run.notes / "disk-full").touch()
        return True
    if fault == "driver killed":
        process.kill()
        return True
    alive = {child.pid: child for child in children_of(process)}
    if fault == "raylet killed":
        pids = [int((run.notes / "raylet").read_text())]
    else:
        pids = [pid for _, pid in reversed(run.events())]
    victim = next((alive[pid] for pid in pids if pid in alive), None)
    if victim is not None:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    return victim is not None


def disturb(bench: Bench, name: str, place: str, faults: tuple[str, ...], rng: random.Random) -> dict[str, Any]:
    """One run with its faults, the same command again without, and what came of it."""
    run = bench.new_run(name, place)
    bench.proxy.kinds = tuple(fault for fault in faults if fault in ("S3 errors", "cut bodies"))
    bench.proxy.random.seed(rng.random())
    spoiled = bench.proxy.spoiled
    hits = [fault for fault in faults if fault not in bench.proxy.kinds]
    commits = rng.randrange(UNITS - AT_ONCE[engine_of(place)])
    pauses = [rng.uniform(0, 0.4), *(rng.uniform(0, 0.1) for _ in hits[1:])]
    started = time.monotonic()
    process = run.start()
    family: list[psutil.Process] = []
    struck = []
    # A fault before the first unit would hit nothing but imports.
    while process.is_alive() and (run.commits < commits or not run.events()):
        if time.monotonic() > started + PATIENCE_S:
            break
        time.sleep(0.02)
    for fault, pause in zip(hits, pauses, strict=False):
        time.sleep(pause)
        family += children_of(process)
        # After another fault there may be no worker to kill before Ray has started one.
        while process.is_alive() and time.monotonic() < started + PATIENCE_S:
            if strike(fault, run, process):
                struck.append(fault)
                break
            time.sleep(0.05)
    if bench.proxy.kinds:
        family += children_of(process)
    first = finish(process, family)
    if bench.proxy.spoiled > spoiled:
        struck += bench.proxy.kinds
    committed_before = run.commits
    bench.proxy.kinds = ()
    (run.notes / "disk-full").unlink(missing_ok=True)
    again = run.start()
    second = finish(again, [])
    verdict = verify(SinkConfig(folder=str(run.out)), find_run(str(run.out)).record)
    found, wanted = results(run.out), asked(shards=SHARDS, rows=ROWS)
    calm, written = bench.calm[storage_of(place)], contents(run.out)
    differing = {name for name in {*calm, *written} if calm.get(name) != written.get(name)}
    begun = Counter(unit for unit, _ in run.events())
    row = {
        "place": place,
        "faults": list(faults),
        "struck": struck,
        "first_exit": first,
        "units_before_rerun": committed_before,
        "rerun_exit": second,
        "lost": sum((wanted - found).values()),
        "doubled": sum((found - wanted).values()),
        "recomputed": UNIT_SIZE * sum(count - 1 for count in begun.values()),
        "seconds_lost": round(time.monotonic() - started - bench.calm_seconds[place], 1),
        "temporary_files_left": verdict.temporary,
        "differing": sorted(differing),
        "bytes_equal": not differing,
        "findings": [f"{finding.kind}: {finding.path}" for finding in verdict.findings],
        "verified": verdict.clean,
    }
    if first is None or second != 0:
        row["log"] = (run.notes / "log").read_text(errors="replace")[-4000:]
    shutil.rmtree(run.out, ignore_errors=True)
    return row


def engine_of(place: str) -> str:
    """What `run.engine` is at a place."""
    return "local" if place.startswith("local") else "ray"


def storage_of(place: str) -> str:
    """Runs on one kind of storage write the same bytes, wherever they run; manifests name the store's versions."""
    return "s3" if place.endswith("+s3") else "disk"


def calm_run(bench: Bench, place: str) -> None:
    """An undisturbed run at a place, once, to compare with."""
    if place in bench.calm_seconds:
        return
    run = bench.new_run(f"calm-{place.replace('+', '-')}", place)
    started = time.monotonic()
    code = finish(run.start(), [])
    bench.calm_seconds[place] = time.monotonic() - started
    if code != 0 or results(run.out) != asked(shards=SHARDS, rows=ROWS):
        raise SystemExit(f"the undisturbed run on {place} failed ({code}):\n{(run.notes / 'log').read_text()}")
    written = contents(run.out)
    if bench.calm.setdefault(storage_of(place), written) != written:
        raise SystemExit(f"the undisturbed run on {place} wrote other bytes than the one before it")


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """A line for each kind of fault."""
    table = Table(title="Faults", title_justify="left")
    for column in (
        "fault",
        "where",
        "runs",
        "ended by itself",
        "after rerun",
        "lost",
        "doubled",
        "recomputed",
        "temporary",
        "s lost",
    ):
        table.add_column(column, justify="left" if column in ("fault", "where") else "right")
    kinds = dict.fromkeys((" + ".join(row["faults"]), row["place"]) for row in rows)
    for kind, place in kinds:
        ours = [row for row in rows if (" + ".join(row["faults"]), row["place"]) == (kind, place)]
        table.add_row(
            kind,
            place,
            str(len(ours)),
            str(sum(row["first_exit"] == 0 for row in ours)),
            str(sum(row["rerun_exit"] == 0 and row["bytes_equal"] and row["verified"] for row in ours)),
            str(sum(row["lost"] for row in ours)),
            str(sum(row["doubled"] for row in ours)),
            f"{sum(row['recomputed'] for row in ours) / len(ours):.1f} of {SHARDS * ROWS}",
            str(sum(row["temporary_files_left"] for row in ours)),
            f"{sum(row['seconds_lost'] for row in ours) / len(ours):.1f}",
        )
    console.print(table)


def summary_of(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """What build/faults.json holds."""
    return {
        "runs": len(rows),
        "faults": sum(len(row["struck"]) for row in rows),
        "lost": sum(row["lost"] for row in rows),
        "doubled": sum(row["doubled"] for row in rows),
        "recomputed_share": round(sum(row["recomputed"] for row in rows) / (len(rows) * SHARDS * ROWS), 4),
        "bytes_equal": all(row["bytes_equal"] for row in rows),
        "verified": sum(row["verified"] for row in rows),
        "temporary_files_left": sum(row["temporary_files_left"] for row in rows),
        "hung": sum(row["first_exit"] is None or row["rerun_exit"] is None for row in rows),
        "seed": seed,
        "each": rows,
    }


def campaign(seed: int, only: str) -> dict[str, Any]:
    """All runs, one after the other."""
    chosen = [line for line in CAMPAIGN if only in " + ".join(line[2])]
    rows = []
    # Short: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="sf-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_shards(folder / "in", shards=SHARDS, rows=ROWS)
        with faulty_s3(folder / "s3") as (server, proxy):
            for shard in (folder / "in").iterdir():
                shutil.copy(shard, server.bucket("in"))
            for name in [name for name in os.environ if name.startswith(("RAY_", "AWS_"))]:
                del os.environ[name]
            os.environ.update(
                server.environment,
                AWS_ENDPOINT_URL=proxy.endpoint,
                OMP_NUM_THREADS="1",
                RAY_TMPDIR=str(folder),
                RAY_USAGE_STATS_ENABLED="0",
            )
            PROCESSES.set_forkserver_preload(PRELOADED)
            first = PROCESSES.Process(target=int)  # waits for the imports, which are no run's time
            first.start()
            first.join()
            bench = Bench(folder, server, proxy)
            for kind, (count, place, faults) in enumerate(chosen):
                calm_run(bench, place)
                for number in range(count):
                    rng = random.Random(f"{seed} {place} {faults} {number}")
                    row = disturb(bench, f"run-{kind}-{number}", place, faults, rng)
                    print(json.dumps(row), flush=True)
                    rows.append(row)
    return summary_of(rows, seed)


def main() -> None:
    """Run the campaign, print its table, write build/faults.json; exit code 1 where a row was lost or doubled."""
    parser = argparse.ArgumentParser(description="Disturb runs, repeat them, compare.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds of faults whose name holds this text")
    arguments = parser.parse_args()
    started = time.monotonic()
    found = campaign(arguments.seed, arguments.only)
    found["seconds"] = round(time.monotonic() - started)
    console = Console(width=120)
    show(console, found["each"])
    console.print({key: value for key, value in found.items() if key != "each"})
    BUILD.mkdir(exist_ok=True)
    (BUILD / "faults.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {BUILD / 'faults.json'}")
    raise SystemExit(
        int(
            bool(
                found["lost"]
                or found["doubled"]
                or found["hung"]
                or not found["bytes_equal"]
                or found["verified"] < found["runs"]
            )
        )
    )


if __name__ == "__main__":
    main()
