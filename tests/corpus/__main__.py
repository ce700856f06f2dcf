"""Send the whole corpus through shardedit; print a table of kinds and outcomes, and write build/corpus.json.

python -m tests.corpus
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from pipeline.recipe import recipe_from
from pipeline.running import driver
from tests.corpus import FORMATS, run_corpus
from tests.corpus.commands import DEADLINE_S, World
from tests.corpus.situations import all_situations

RESULT = Path("build/corpus.json")


def main(*words: str) -> None:
    """Run it all; with words, the situations whose kind and name hold each of them."""
    started = time.monotonic()
    counts: dict[str, Counter[str]] = {}
    problems: list[str] = []
    slowest = (0.0, "")
    with tempfile.TemporaryDirectory() as folder:
        if not words:
            found = run_corpus(Path(folder), lambda data: driver.run(recipe_from(data), progress="off"))
            for format in FORMATS:
                cases, ends = found[format]
                for case in cases:
                    counts.setdefault(case.kind, Counter())[ends.outcome(case)] += 1
                    problems += [f"{case.kind}, {case.name}: {text}" for text in ends.problems(case)]
        world = World(Path(folder) / "commands")
        for situation in all_situations():
            label = f"{situation.kind}, {situation.name}"
            if all(word in label for word in words):
                met = world.meet(situation)
                counts.setdefault(situation.kind, Counter())[met.outcome] += 1
                problems += [f"{label}: {text}" for text in met.problems()]
                slowest = max(slowest, *((end.seconds, f"{label}: {end.command}") for end in met.ends))
    total = sum(counts.values(), Counter[str]())
    outcomes = sorted(total)
    print(f"{'kind':32}{'inputs':>8}" + "".join(f"{name:>10}" for name in outcomes))
    for kind, count in counts.items():
        print(f"{kind:32}{count.total():8}" + "".join(f"{count[name]:10}" for name in outcomes))
    result = {
        "inputs": total.total(),
        **{name: total[name] for name in ("crashed", "hung", "misblamed")},
        "unexpected": len(problems),
        "deadline_s": DEADLINE_S,
        "slowest_s": round(slowest[0], 2),
        "slowest": slowest[1],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "seconds": round(time.monotonic() - started, 1),
        "kinds": {kind: dict(count) for kind, count in counts.items()},
    }
    print("\n".join(problems), *(f"{key}: {result[key]}" for key in list(result)[:-1]), sep="\n")
    if not words:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main(*sys.argv[1:])
