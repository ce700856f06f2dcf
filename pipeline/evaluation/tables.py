"""From rows of scores to tables: what each method reached, on how many rows, and which differences are none.

A comparison counts the rows that all methods with any number have one in; beside it stands what each reached on its own
rows. Everything here is a function of the rows: a second run prints the same.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.evaluation.measures import Measure
from pipeline.evaluation.statistics import (
    Compared,
    Described,
    Score,
    Settings,
    compare_all,
    compare_differences,
    describe,
)

SIGNIFICANT = 0.05
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One method in one measure."""

    own: Described  # on all rows in which it has a number
    common: Described  # on those in which all methods have


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """All that is printed of an evaluation."""

    title: str
    asked: dict[str, int]  # rows, by method
    reasons: dict[str, dict[str, int]]  # rows without numbers, by method and class
    notes: dict[str, dict[str, int]]  # oddities, by method and class
    measures: dict[str, Measure]  # those with numbers, in the order of the columns
    lines: dict[str, dict[str, Line]]  # by measure and method
    pairs: dict[str, list[Compared]]  # by measure
    unavailable: dict[str, str]
    remarks: tuple[str, ...] = ()

    @property
    def methods(self) -> list[str]:
        """In the order of the rows."""
        return list(self.asked)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "title": self.title,
            "asked": self.asked,
            "reasons": self.reasons,
            "notes": self.notes,
            "measures": {
                name: {method: asdict(line) for method, line in by_method.items()}
                for name, by_method in self.lines.items()
            },
            "pairs": {name: [asdict(one) for one in pairs] for name, pairs in self.pairs.items()},
            "unavailable": self.unavailable,
            "remarks": list(self.remarks),
        }


def tables_of(
    rows: Sequence[Row],
    methods: Sequence[str],
    measures: Mapping[str, Measure],
    settings: Settings,
    *,
    title: str,
    unavailable: Mapping[str, str],
    remarks: Sequence[str] = (),
    differences: Mapping[str, Mapping[tuple[str, str], Sequence[tuple[str, float]]]] | None = None,
) -> Tables:
    """Count, describe and compare.

    Args:
        rows: of all methods.
        methods: in the order in which they are printed.
        measures: to look at; those in which nobody has a number are left out.
        settings: of intervals and tests.
        title: of the table.
        unavailable: measures that could not be had, with the way to get them.
        remarks: printed below.
        differences: by measure, (image, first minus second) of every two methods, where pairs were looked at as such.
    """
    direct = differences or {}
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}
    lines, pairs, kept = {}, {}, {}
    for name, measure in measures.items():
        scores = {method: scores_in(some, name) for method, some in by_method.items()}
        if not any(scores.values()):
            continue
        # A method that never has a number, as one without a mask has no overlap, keeps nobody from being compared.
        shared = set.intersection(*({score.item for score in some} for some in scores.values() if some))
        common = {method: [score for score in some if score.item in shared] for method, some in scores.items()}
        kept[name] = measure
        own = {method: describe(some, settings) for method, some in scores.items()}
        lines[name] = {
            method: Line(
                own=own[method],
                # Mostly the same rows: nothing is drawn twice.
                common=own[method] if common[method] == scores[method] else describe(common[method], settings),
            )
            for method in by_method
        }
        if name in direct:
            pairs[name] = compare_differences(direct[name], settings)
        else:
            pairs[name] = compare_all(scores, settings) if measure.higher_is_better is not None else []
    return Tables(
        title=title,
        asked={method: len(some) for method, some in by_method.items()},
        reasons={name: _counted(row["reason"] for row in some if row["reason"]) for name, some in by_method.items()},
        notes={name: _counted(note for row in some for note in row["notes"]) for name, some in by_method.items()},
        measures=kept,
        lines=lines,
        pairs=pairs,
        unavailable=dict(unavailable),
        remarks=tuple(remarks),
    )


def scores_in(rows: Sequence[Row], measure: str) -> list[Score]:
    """The numbers of some rows in one measure."""
    return [
        Score(
            image=row["image"],
            item=f"{row['item']}\x1f{row['edit']}",
            edit_type=row["edit_type"],
            value=row[measure],
        )
        for row in rows
        if row.get(measure) is not None
    ]


def _counted(classes: Any) -> dict[str, int]:
    return dict(sorted(Counter(classes).items()))


def best_of(tables: Tables, name: str) -> tuple[set[str], set[str]]:
    """Methods that are best in a measure, and those that cannot be told from one of these."""
    measure, lines = tables.measures[name], tables.lines[name]
    means = {method: line.common.mean_of_items for method, line in lines.items()}
    numbers = [mean for mean in means.values() if mean is not None]
    if measure.higher_is_better is None or not numbers:
        return set(), set()
    best = max(numbers) if measure.higher_is_better else min(numbers)
    winners = {method for method, mean in means.items() if mean == best}
    near = {
        other
        for pair in tables.pairs[name]
        if pair.p_adjusted is not None and pair.p_adjusted >= SIGNIFICANT
        for one, other in ((pair.first, pair.second), (pair.second, pair.first))
        if one in winners
    }
    return winners, near - winners


def number(value: float | None, measure: Measure) -> str:
    """A value as a table prints it."""
    return "" if value is None else f"{value * measure.factor:.{measure.digits}f}"


def cell(described: Described, measure: Measure) -> str:
    """Mean and interval: ± only where both sides are printed alike."""
    mean = described.mean_of_items
    if mean is None or described.interval is None:
        return number(mean, measure)
    low, high = described.interval
    down, up = number(mean - low, measure), number(high - mean, measure)
    if down == up:
        return f"{number(mean, measure)} ± {up}"
    return f"{number(mean, measure)} [{number(low, measure)}, {number(high, measure)}]"


def grid(tables: Tables) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """The comparison as heads and rows of (text, mark); marks are "best", "near" or ""."""
    heads = ["method", "n", *(measure.title for measure in tables.measures.values())]
    marks = {name: best_of(tables, name) for name in tables.measures}
    rows = []
    for method in tables.methods:
        counts = {line[method].common.n for line in tables.lines.values() if line[method].own.n}
        n = "-".join(str(one) for one in dict.fromkeys((min(counts, default=0), max(counts, default=0))))
        cells = [(f"`{method}`", ""), (f"{n} of {tables.asked[method]}", "")]
        for name, measure in tables.measures.items():
            best, near = marks[name]
            mark = "best" if method in best else "near" if method in near else ""
            cells.append((cell(tables.lines[name][method].common, measure), mark))
        rows.append(cells)
    return heads, rows


def markdown(tables: Tables) -> str:
    """All tables as one page of Markdown."""
    heads, rows = grid(tables)
    marked = [[{"best": f"**{text}**", "near": f"<u>{text}</u>"}.get(mark, text) for text, mark in row] for row in rows]
    parts = [
        f"# {tables.title}",
        "Means over the rows in which all methods have a number, with 95 % intervals; n: these, of the rows asked for. "
        "Bold: best. Underlined: not distinguishable from the best (adjusted p >= 0.05).",
        _table(heads, marked),
        "## Rows without a number, and oddities",
        _table(["method", "asked", "class", "rows"], _reason_rows(tables)),
        "## By type of edit",
        _table(*type_grid(tables)),
        "## Pairs of methods",
        "Mean difference first minus second on the rows of both; wins of the larger value. p: Wilcoxon (Pratt), "
        "adjusted for all pairs of a measure.",
        _table(*pair_grid(tables)),
    ]
    if tables.unavailable:
        parts += ["## Unavailable", _table(["measure", "why, and the way to get it"], _items(tables.unavailable))]
    parts += tables.remarks
    return "\n\n".join(parts) + "\n"


def _items(mapping: Mapping[str, str]) -> list[list[str]]:
    return [[name, " ".join(text.split())] for name, text in mapping.items()]


def _reason_rows(tables: Tables) -> list[list[str]]:
    found = []
    for method in tables.methods:
        for name, count in (tables.reasons[method] | tables.notes[method]).items():
            found.append([f"`{method}`", str(tables.asked[method]), name, str(count)])
    return found or [["all", "", "none", "0"]]


def type_grid(tables: Tables) -> tuple[list[str], list[list[str]]]:
    """Each method's own rows by type: mean (n)."""
    heads = ["method", "type", *(measure.title for measure in tables.measures.values())]
    rows = []
    for method in tables.methods:
        types = sorted({kind for line in tables.lines.values() for kind in line[method].own.types})
        for kind in types:
            cells = []
            for name, measure in tables.measures.items():
                one = tables.lines[name][method].own.types.get(kind)
                cells.append("" if one is None else f"{number(one.mean, measure)} ({one.n})")
            rows.append([f"`{method}`", kind, *cells])
    return heads, rows


def pair_grid(tables: Tables) -> tuple[list[str], list[list[str]]]:
    """Every two methods in every measure."""
    heads = ["measure", "first", "second", "n", "difference", "wins", "ties", "losses", "p", "tests"]
    rows = []
    for name, pairs in tables.pairs.items():
        measure = tables.measures[name]
        for one in pairs:
            low_high = ""
            if one.interval is not None:
                low_high = f" [{number(one.interval[0], measure)}, {number(one.interval[1], measure)}]"
            p = "" if one.p_adjusted is None else f"{one.p_adjusted:.2g}"
            counts = (str(one.wins), str(one.ties), str(one.losses), p, str(one.tests))
            difference = number(one.mean_difference, measure) + low_high
            rows.append([measure.title, f"`{one.first}`", f"`{one.second}`", str(one.n), difference, *counts])
    return heads, rows


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(text.replace('|', '/') for text in row)} |" for row in rows)])


def latex(tables: Tables) -> str:
    """The comparison as a LaTeX table."""
    heads, rows = grid(tables)
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule"]
    lines += [" & ".join(_tex(head) for head in heads) + r" \\", r"\midrule"]
    for row in rows:
        texts = [
            {"best": rf"\textbf{{{_tex(text)}}}", "near": rf"\underline{{{_tex(text)}}}"}.get(mark, _tex(text))
            for text, mark in row
        ]
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _tex(text: str) -> str:
    for char, code in {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "`": ""}.items():
        text = text.replace(char, code)
    for char, code in {"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}.items():
        text = text.replace(char, code)
    return re.sub(r"x10\^(\d)", r"$\\times 10^\1$", text)


CSV_COLUMNS = (
    *("method", "measure", "rows", "edit_type", "n", "asked", "mean", "median", "low", "high"),
    *("mean_of_types", "reasons"),
)


def as_csv(tables: Tables) -> str:
    """Everything in full precision and without factors: a line per method, measure and type; "" is all types."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for name, lines in tables.lines.items():
        for method, line in lines.items():
            reasons = ";".join(f"{reason}={count}" for reason, count in tables.reasons[method].items())
            for rows, one in (("own", line.own), ("common", line.common)):
                low, high = one.interval or (None, None)
                whole = (one.n, tables.asked[method], one.mean_of_items, one.median, low, high, one.mean_of_types)
                writer.writerow((method, name, rows, "", *whole, reasons))
                for kind, of_type in one.types.items():
                    writer.writerow((method, name, rows, kind, of_type.n, "", of_type.mean, "", "", "", "", ""))
    return out.getvalue()


def pairs_csv(tables: Tables) -> str:
    """Every two methods in every measure, in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [name for name in Compared.__slots__ if name != "interval"]
    writer.writerow(["measure", *names, "low", "high"])
    for measure, pairs in tables.pairs.items():
        for one in pairs:
            low, high = one.interval or (None, None)
            writer.writerow([measure, *(getattr(one, name) for name in names), low, high])
    return out.getvalue()
