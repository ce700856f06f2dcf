"""Runs with gates: every result once, in data, rejected or quarantine, with its figures; and the same after a kill."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.errors import RecipeError, RunAborted
from pipeline.evaluation.judging.asking import JudgeError
from pipeline.looking.printing import gate_lines
from pipeline.looking.regenerate import regenerate
from pipeline.looking.report.page import write_report
from pipeline.looking.results import RunFolder
from pipeline.looking.runs import find_run
from pipeline.looking.status import status
from pipeline.looking.verify import Inspection, verify
from pipeline.recipe import Recipe, recipe_from
from pipeline.running import driver, in_process
from pipeline.running.tally import Tally
from pipeline.settings.sections import RunConfig
from pipeline.writing import finish
from pipeline.writing.manifest import NOT_MEASURED, GateCounts, Manifest
from pipeline.writing.run_record import read_run_record
from tests.evaluation.fake_judge import Reply, fake_judge
from tests.runs import asked, contents, recipe_data, write_shards

datasets = pytest.importorskip("datasets")
KINDS = ("data", "rejected", "quarantine")
GATES = {"preset": "none", "change_inside": {"min": 70}, "background_psnr": {"min": 5}}  # edit b changes less


def gated(folder: Path, out: str, gates: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    data = recipe_data(folder / "in", folder / out, sink=sections.pop("sink", None), engine="local")
    return recipe_from(data | {"gates": gates or GATES} | sections)


def checked(recipe: Recipe) -> Inspection:
    record = read_run_record(recipe.sink)
    assert record is not None
    return verify(recipe.sink, record)


def rows(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    files = sorted(Path(recipe.sink.folder, kind).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of five images, one of which is none, some of whose results are rejected."""
    folder = tmp_path_factory.mktemp("gated")
    write_shards(folder / "in", shards=1, rows=5)
    recipe = gated(folder, "out")
    driver.run(recipe, progress="off")
    return recipe


def test_every_result_is_kept_or_rejected_or_failed_once(done: Recipe) -> None:
    found = Counter((row["id"], row["edit"], row["method"]) for kind in KINDS for row in rows(done, kind))
    assert found == asked(shards=1, rows=5)
    kept, rejected = rows(done, "data"), rows(done, "rejected")
    assert kept
    assert rejected
    assert len(rows(done, "quarantine")) == 2
    assert all(row["change_inside"] >= 70 and row["reject_reasons"] == [] for row in kept)
    assert all(row["change_inside"] < 70 and row["reject_reasons"] == ["change_inside"] for row in rejected)
    assert {*kept[0]} == {*rejected[0]}
    assert rejected[0]["image"]["bytes"]
    assert rejected[0]["align_verdict"]
    assert checked(done).findings == []


def test_status_summary_and_report_tell_what_survived_each_gate(done: Recipe) -> None:
    record = read_run_record(done.sink)
    assert record is not None
    so_far = status(done.sink, record).so_far
    kept, rejected = len(rows(done, "data")), len(rows(done, "rejected"))
    assert (so_far.done, so_far.rejected, so_far.failed) == (kept, rejected, 2)
    assert so_far.planned == 10
    assert so_far.outcome == "complete with failures"
    lines = gate_lines(so_far.gates, so_far.rejected)
    assert lines["  change_inside"].startswith(f"{kept} of {kept + rejected} passed")
    assert f"{rejected} rejected by it alone" in lines["  change_inside"]
    assert lines["  background_psnr"].startswith("8 of 8 passed (100%)")
    write_report(done.sink)
    page = Path(done.sink.folder, "report.html").read_text()
    assert f"{kept} of 10 results passed every gate" in page
    assert page.count("rejected: change_inside") == rejected
    refs = RunFolder(done.sink)
    assert {ref.reasons for ref in refs.figures(refs.spans("rejected"))} == {("change_inside",)}


def test_rejected_results_are_a_split_beside_the_accepted_ones(done: Recipe) -> None:
    opened = datasets.load_dataset(done.sink.folder)
    assert {name: split.num_rows for name, split in opened.items()} == {
        "train": len(rows(done, "data")),
        "rejected": len(rows(done, "rejected")),
    }
    assert opened["rejected"][0]["reject_reasons"] == ["change_inside"]


def test_a_rejected_result_is_made_again_to_the_same_bytes(done: Recipe) -> None:
    row = rows(done, "rejected")[0]
    made = regenerate(find_run(done.sink.folder), row["id"], edit=row["edit"])
    assert made.equal, made.differences


def test_a_row_in_the_wrong_split_is_found(done: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "in", shards=1, rows=2, damaged=())
    monkeypatch.setattr(finish, "is_kept", lambda row: False)
    recipe = gated(tmp_path, "out", GATES | {"change_inside": {"min": 1}})
    driver.run(recipe, progress="off")
    assert any("no gate rejected it" in finding.text for finding in checked(recipe).findings)


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_gated_run_that_died_goes_on_to_the_same_bytes(
    kind: str, done: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "in", shards=1, rows=5)
    calm, killed = (gated(tmp_path, name, sink={"format": kind}) for name in ("calm", "killed"))
    driver.run(calm, progress="off")
    commit, made = in_process.commit, []

    def dies(*args: Any) -> Any:
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(commit(*args))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(in_process, "commit", dies)
        with pytest.raises(KeyboardInterrupt):
            driver.run(killed, progress="off")
    driver.run(killed, progress="off")
    assert contents(Path(killed.sink.folder)) == contents(Path(calm.sink.folder))
    assert checked(killed).findings == []


def test_what_a_replay_does_not_give_back_is_not_edited(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", shards=1, rows=1, damaged=())
    ddim = {"inversion": {"method": "ddim", "num_steps": 4}, "editing": {"method": "reconstruct"}}
    plain, paid = (
        gated(tmp_path, name, {"preset": "none", "inversion_psnr": {"min": least}}, **ddim)
        for name, least in (("out", 99.9), ("paid", 0.0))
    )
    stopped, edited = driver.run(plain, progress="off"), driver.run(paid, progress="off")
    assert (stopped.rejected, stopped.done, edited.done) == (2, 0, 2)
    assert stopped.network_rows < edited.network_rows
    found = rows(plain, "rejected")
    assert {row["inversion_psnr"] for row in found} == {row["inversion_psnr"] for row in rows(paid, "data")}
    assert all(row["reject_reasons"] == ["inversion_psnr"] and row["change_inside"] is None for row in found)


def test_gates_that_let_nothing_pass_end_the_run_with_what_they_saw(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", shards=1, rows=6, damaged=())
    recipe = gated(tmp_path, "out", GATES | {"change_inside": {"min": 250}})
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"max_consecutive_failed_units": 2})})
    with pytest.raises(RunAborted) as ended:
        driver.run(recipe, progress="off")
    assert "the gates let no result of the first 2 units pass" in str(ended.value)
    assert "change_inside rejected 8 (8 alone); seen " in str(ended.value)
    assert "background_psnr" not in str(ended.value)


def judged(folder: Path, out: str, url: str, **gates: Any) -> Recipe:
    judge = {"base_url": url, "model": "fake", "tries": 1}
    return gated(folder, out, {"preset": "none", "judge": judge, "judge_overall": {"min": 7}, **gates})


def test_a_judge_scores_what_passes_and_is_asked_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "in", shards=1, rows=4, damaged=())

    def script(digest: str, part: str, attempt: int) -> Reply:
        good = int(digest, 16) % 2
        return Reply(content=f'{{"score": [{9 if good else 3}, 9], "reasoning": "seen"}}')

    with fake_judge(script) as judge:
        recipe = judged(tmp_path, "out", judge.url, change_inside={"min": 70})
        made: list[Any] = []

        def dies(*args: Any) -> Any:
            made.append(args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(in_process, "commit", dies)
            with pytest.raises(KeyboardInterrupt):
                driver.run(recipe, progress="off")
        assert made
        driver.run(recipe, progress="off")
        assert set(judge.asked.values()) == {1}
        every = [row for kind in ("data", "rejected") for row in rows(recipe, kind)]
        seen = [row for row in every if row["judge_overall"] is not None]
        assert len(judge.asked) == 2 * len(seen) < 2 * len(every)
        for row in every:
            unasked = row["change_inside"] < 70
            assert unasked == (row["judge_overall"] is None)
            assert row["reject_reasons"] == (
                ["change_inside"] if unasked else [] if row["judge_overall"] >= 7 else ["judge_overall"]
            )
        assert {row["judge_reasoning_sc"] for row in seen} == {"seen"}
        assert checked(recipe).findings == []
        asked_before = judge.asked.total()
        made_again = regenerate(find_run(recipe.sink.folder), seen[0]["id"], edit=seen[0]["edit"])
        assert made_again.equal, made_again.differences
        assert judge.asked.total() == asked_before


def test_a_judge_rewrites_the_instructions_of_what_passes_and_is_asked_once(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", shards=1, rows=4, damaged=())

    seen: dict[str, int] = {}

    def script(digest: str, part: str, attempt: int) -> Reply:
        if part == "rewrite":  # of every second picture it has nothing to say, however often it is asked
            says = "null" if seen.setdefault(digest, len(seen)) % 2 else '"Put a hat on."'
        return Reply(content=f'{{"reasoning": "seen", "instruction": {says}}}') if part == "rewrite" else Reply()

    with fake_judge(script) as judge:
        recipe = judged(tmp_path, "out", judge.url, change_inside={"min": 70}, judge_overall=None)
        recipe = recipe_from(
            recipe.model_dump(mode="json", exclude={"methods"}) | {"instructions": {"rewritten": True}}
        )
        driver.run(recipe, progress="off")
        kept, rejected = rows(recipe, "data"), rows(recipe, "rejected")
        assert {(row["instruction_source"], row["instruction_reason"]) for row in rejected} == {("templates", None)}
        assert all("concept b" in row["instruction"] == row["instruction_given"] for row in rejected)
        told = [row for row in kept if row["instruction_source"] == "judge"]
        assert {row["instruction"] for row in told} == {"Put a hat on."}
        assert all(row["instruction_given"] != row["instruction"] and row["instruction_revision"] for row in told)
        untold = [row for row in kept if row["instruction_source"] == "templates"]
        assert len(told) + len(untold) == len(kept)
        assert {row["instruction_reason"] for row in untold} == {"no_sentence"}
        assert all(row["instruction"] == row["instruction_given"] for row in untold)
        assert told
        assert untold
        before = judge.asked.total()
        made = regenerate(find_run(recipe.sink.folder), told[0]["id"], edit=told[0]["edit"])
        assert made.equal, made.differences
        assert judge.asked.total() == before


def test_nobody_rewrites_without_a_judge(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"instructions.rewritten: needs who rewrites. Set gates.judge to a judge"):
        gated(tmp_path, "out", instructions={"rewritten": True})


def test_a_judge_that_cannot_be_asked_ends_the_run_and_quarantines_nothing(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", shards=1, rows=2, damaged=())
    with fake_judge(lambda *_: Reply(status=401, body=b'{"error": {"message": "no such key"}}')) as judge:
        recipe = judged(tmp_path, "out", judge.url)
        with pytest.raises(JudgeError):
            driver.run(recipe, progress="off")
    assert rows(recipe, "quarantine") == []


def test_a_protocol_that_compares_methods_is_refused_as_a_gate(tmp_path: Path) -> None:
    judge = {"model": "fake", "protocol": "pairwise"}
    with pytest.raises(RecipeError, match=r"gates.judge.protocol: is 'pairwise', which scores no single result"):
        gated(tmp_path, "out", {"preset": "none", "judge": judge, "judge_overall": {"min": 7}})


def test_units_that_are_rejected_altogether_end_no_run_in_which_anything_passed() -> None:
    tally = Tally(RunConfig(max_consecutive_failed_units=2))
    manifests = [unit_of(chunk, ok=chunk == 0) for chunk in range(5)]
    assert [tally.add(manifest) for manifest in manifests] == [""] * 5
    hopeless = Tally(RunConfig(max_consecutive_failed_units=2))
    assert [bool(hopeless.add(manifest)) for manifest in manifests[1:3]] == [False, True]


def unit_of(chunk: int, *, ok: bool) -> Manifest:
    """A unit of one result."""
    gate = GateCounts(passed=int(ok), rejected=int(not ok), alone=0, undefined=0, measured=1, seen=(1.0,) * 5)
    counts = {"images": 1, "asked": 1, "ok": int(ok), "failed": 0, "failed_by_stage": {}, "failed_by_class": {}}
    counts |= {"rejected": int(not ok), "rejected_rows": int(not ok), "gates": {"mask_share": gate}}
    return Manifest.model_validate(
        {
            "unit": f"s0-3fa2b1c4-{chunk:05d}", "generation": 1, "shard": "s0.tar", "chunk": chunk, "start": chunk,
            "stop": chunk + 1, "is_last": False, "shard_size": 1, "shard_etag": "", "recipe_hash": "", "files": (),
            "code_version": "", "model_digest": "", "call_size": 1, "counts": counts, "measured": NOT_MEASURED,
        }
    )  # fmt: skip
