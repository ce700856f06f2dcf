"""evaluate/index.html: the comparison in one page that needs no network: tables, plots, and images side by side.

Methods are columns, images rows. A result can be laid over its input by a slider, shown as the difference to it, and
tinted where it should change. Figures of all rows are in the tables and plots; pictures are those of chosen images: the
worst and the best of every method, and others spread over the set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2

import pipeline
from pipeline.common.wording import shown
from pipeline.evaluation.items import Result
from pipeline.evaluation.job.measuring import Unit
from pipeline.evaluation.job.plots import boxes, trade_off
from pipeline.evaluation.layouts import FOLDERS, place
from pipeline.evaluation.tables import Tables, grid, number, pair_grid, type_grid
from pipeline.looking.report.thumbnails import data_uri, mask_uri, small_mask, small_rgb

ITEMS = 60  # with pictures, unless more is asked for
UNREADABLE = ("broken_image", "failed_read", "failed_decode")  # reasons of rows whose input is none
MOST_PAIRS = 1000  # lines of the table of pairs
EXTREMES = 3  # worst and best of every method
# The first that has numbers is taken: what an edit left alone, and how far it went.
KEPT = ("psnr_unedit_part", "ssim_unedit_part", "structure_distance", "psnr")
DONE = (
    "judge_overall",
    "judge_preference",
    "success",
    "clip_similarity_target_image",
    "clip_sim_dir",
    "truth_psnr",
    "mask_iou",
)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Items that are shown with pictures, and why."""

    items: tuple[str, ...]  # names: item and edit
    whole: int  # items of the evaluation


def name_of(item: str, edit: str) -> str:
    """Of an item and its edit."""
    return f"{item} · {edit}" if edit else item


def chosen_items(rows: Sequence[Row], tables: Tables, most: int = ITEMS) -> Chosen:
    """The worst and the best of every method in the first measure that has a direction, then others in equal steps."""
    names = list(dict.fromkeys(name_of(row["item"], row["edit"]) for row in rows))
    wanted: dict[str, None] = {}
    measure = next((name for name, one in tables.measures.items() if one.higher_is_better is not None), None)
    if measure is not None:
        for method in tables.methods:
            scored = [row for row in rows if row["method"] == method and row[measure] is not None]
            scored.sort(key=lambda row: (row[measure], row["item"]))
            for row in (*scored[:EXTREMES], *scored[-EXTREMES:]):
                wanted[name_of(row["item"], row["edit"])] = None
    for row in rows:
        if row["reason"]:
            wanted[name_of(row["item"], row["edit"])] = None
    kept = set(list(wanted)[:most])
    others = [name for name in names if name not in kept]
    left = most - len(kept)
    if left > 0 and others:
        step = max(1.0, len(others) / left)
        kept |= {others[int(at * step)] for at in range(min(left, len(others)))}
    return Chosen(items=tuple(name for name in names if name in kept), whole=len(names))


def page_of(
    tables: Tables,
    rows: Sequence[Row],
    units: Iterable[tuple[Unit, Sequence[Row]]],
    kind: str,
    load: Callable[[Unit], list[Result]],
    *,
    official: bool,
    most: int = ITEMS,
) -> str:
    """The page.

    Args:
        tables: what is printed of the evaluation.
        rows: of all methods.
        units: with their rows.
        kind: of the set.
        load: gives a unit's results, of those that hold a chosen item.
        official: results stand in the benchmark's own layout beside the page, and are linked.
        most: images with pictures.
    """
    chosen = chosen_items(rows, tables, most)
    cards = _cards(chosen, tables, rows, units, kind if official else "", load)
    heads, cells = grid(tables)
    type_heads, type_rows = type_grid(tables)
    pair_heads, pair_rows = pair_grid(tables)
    preserved = next((name for name in KEPT if name in tables.measures), None)
    done = next((name for name in DONE if name in tables.measures), None)
    values = {
        "version": pipeline.__version__,
        "tables": tables,
        "heads": heads,
        "cells": cells,
        "type_heads": type_heads,
        "type_rows": type_rows,
        "pair_heads": pair_heads,
        "pair_rows": pair_rows[:MOST_PAIRS],
        "pairs_left": max(0, len(pair_rows) - MOST_PAIRS),
        "types": sorted({row["edit_type"] for row in rows}),
        "plot": trade_off(tables, preserved, done) if preserved and done else "",
        "boxes": [boxes(tables, name, rows) for name in tables.measures],
        "cards": cards,
        "note": f"{len(cards)} of {chosen.whole} images: the worst and best of every method, failures, and others "
        "spread over the set."
        if len(cards) < chosen.whole
        else f"All {chosen.whole} images.",
    }
    return _template().render(values)


def _cards(
    chosen: Chosen,
    tables: Tables,
    rows: Sequence[Row],
    units: Iterable[tuple[Unit, Sequence[Row]]],
    kind: str,
    load: Callable[[Unit], list[Result]],
) -> list[dict[str, Any]]:
    wanted = set(chosen.items)
    by_place = {(name_of(row["item"], row["edit"]), row["method"]): row for row in rows}
    cards: dict[str, dict[str, Any]] = {}
    for unit, some in units:
        if not wanted & {name_of(row["item"], row["edit"]) for row in some}:
            continue
        for result in load(unit):
            name = name_of(result.item.key, result.edit)
            if name in wanted and (row := by_place.get((name, result.method))) is not None:
                card = cards.setdefault(name, _card(name, result, row))
                if not card["source"] and result.item.image is not None:
                    card |= _card(name, result, row) | {"cells": card["cells"]}
                card["cells"][result.method] = _cell(result, row, tables, kind)
    return [cards[name] for name in chosen.items if name in cards]


def _card(name: str, result: Result, row: Row) -> dict[str, Any]:
    item = result.item
    return {
        "name": name,
        "type": item.edit_type,
        "asked": item.request.instruction or item.request.target_prompt,
        # What the decoder in its own process has refused is not opened here.
        "source": "" if row["reason"].startswith(UNREADABLE) else _picture(item.image),
        "region": "" if row["reason"] else _region(item.region),
        "problem": item.problem,
        "cells": {},
    }


def _cell(result: Result, row: Row, tables: Tables, kind: str) -> dict[str, Any]:
    figures = {
        measure.title: number(row[name], measure) for name, measure in tables.measures.items() if row[name] is not None
    }
    return {
        "picture": "" if row["reason"] else _picture(result.image),
        "reason": row["reason"],
        "message": row["message"],
        "figures": figures,
        "data": json.dumps({name: row[name] for name in tables.measures}),
        "link": f"{FOLDERS[kind]}/{result.method}/{place(kind, result.item)}" if kind in FOLDERS else "",
        "notes": list(row["notes"]),
        "said": row.get("judge_reasoning_sc") or row.get("judge_raw") or "",
    }


def _picture(data: bytes | None) -> str:
    """A small picture inside the page; "" for none, or for bytes that are none."""
    if data is None:
        return ""
    try:
        return data_uri(small_rgb(data))
    except Exception:  # a stranger's bytes: its row says what is wrong with them
        return ""


def _region(data: bytes | None) -> str:
    try:
        return "" if data is None else mask_uri(small_mask(data))
    except Exception:  # as above
        return ""


@cache
def _template() -> jinja2.Template:
    # Names, prompts and answers come from outside: autoescape is what keeps them text.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.evaluation.job", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
