"""What interventions reach, by window, block and strength: a thing put in its place, a style, a colour.

The edited attribute is left out of the prompt. Every scene is sampled without an intervention first, and read; then a
value that it does not show is written in, from the same noise. Success: the oracle reads that value. Collateral: the
share of scenes on which another attribute reads differently, for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demo_world.concept_labels import tag_of
from demo_world.concepts_scenes import described, images_of, recipe_of, write_rows
from demo_world.oracle import VALUES, read
from demo_world.scoring import Pixels
from pipeline.models.demo.world import Attribute, Scene, edited
from pipeline.running.driver import run

WINDOWS = {"early": (0.0, 0.3), "middle": (0.3, 0.7), "late": (0.7, 1.0), "first": (0.0, 0.6), "all": (0.0, 1.0)}
EYES = (0.22, 0.4, 0.78, 0.58)  # of a face in the middle, where this world's faces are


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One attribute that is written, and how."""

    attribute: Attribute
    window: str  # that its figure is of
    strength: float
    region: tuple[float, float, float, float] | None = None  # None: where what it replaces is predicted
    blocks: tuple[str, ...] = ()  # that are written to; none: all
    form: str = "direction"

    def intervention(self, before: Any, after: Any) -> dict[str, Any]:
        """What is written into one scene."""
        where = {"region": list(self.region) if self.region else "predicted"}
        remove = {} if before in (False, None) else {"remove": [tag_of(self.attribute, before)]}
        window = list(WINDOWS[self.window])
        blocks = {"blocks": list(self.blocks)} if self.blocks else {}
        concepts = {"add": [tag_of(self.attribute, after)], **remove, "form": self.form}
        return {**concepts, **where, **blocks, "strength": self.strength, "window": window}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What came of one way to write a kind."""

    success: float
    collateral: Mapping[Attribute, float]  # share of scenes, of each other attribute
    scenes: int
    failed: int  # where what is replaced was predicted nowhere; they count as no success

    @property
    def worst(self) -> float:
        """Collateral of the attribute that has most of it."""
        return max(self.collateral.values())

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "success": self.success,
            "collateral": dict(self.collateral),
            "worst_collateral": self.worst,
            "scenes": self.scenes,
            "failed": self.failed,
        }


def other_value(attribute: Attribute, value: Any, number: int) -> Any:
    """Another value, in turn; of a thing that is there or not, that it is there."""
    others = [one for one in VALUES[attribute] if one != value]
    return others[number % len(others)]


def variants_of(kind: Kind, blocks: Sequence[str], factors: Sequence[float]) -> dict[str, tuple[Kind, dict[str, Any]]]:
    """Ways to write a kind, by name: every window; in its own every block alone, other strengths, the other form."""
    found: dict[str, tuple[Kind, dict[str, Any]]] = {
        f"window-{name}": (replace(kind, window=name), {}) for name in WINDOWS
    }
    found |= {f"block-{block.replace('.', '_')}": (kind, {"blocks": [block]}) for block in blocks}
    found |= {
        f"strength-x{factor:g}".replace(".", "_"): (replace(kind, strength=factor * kind.strength), {})
        for factor in factors
    }
    if factors and kind.form == "template":
        found["form-direction"] = (replace(kind, form="direction", strength=1.0), {})
    return found


def write_kind(
    work: Path,
    library: Path,
    kind: Kind,
    scenes: Sequence[Scene],
    studied: int,
    blocks: Sequence[str] = (),
    factors: Sequence[float] = (),
) -> dict[str, Reached]:
    """Every window on all scenes; blocks and strengths on the first `studied`. What is there is not done again."""
    name = kind.attribute
    if kind.region:  # onto faces that lack it
        scenes = [edited(scene, **{name: False}) for scene in scenes]
    prompts = [described(scene, name) for scene in scenes]
    plain_rows = write_rows(work / f"{name}_plain_rows", name, [{"plain": {"target_prompt": one}} for one in prompts])
    run(recipe_of(plain_rows, work / f"{name}_plain"), progress="off")
    plain = {number: read(made["plain"]) for number, made in images_of(work / f"{name}_plain").items()}
    wanted = {number: other_value(name, was[name], number) for number, was in plain.items()}
    windows, every = variants_of(kind, (), ()), variants_of(kind, blocks, factors)
    edits = [
        {
            variant: {
                "target_prompt": prompt,
                "interventions": [{**one.intervention(plain[number][name], wanted[number]), **more}],
            }
            for variant, (one, more) in (every if number < studied else windows).items()
        }
        for number, prompt in enumerate(prompts)
    ]
    rows = write_rows(work / f"{name}_rows", name, edits)
    run(recipe_of(rows, work / name, autoencoders=str(library), reach=0.3), progress="off")
    made = images_of(work / name)
    return {
        variant: judged(
            name,
            {
                number: (plain[number], wanted[number], made.get(number, {}).get(variant))
                for number in plain
                if variant in edits[number]
            },
        )
        for variant in every
    }


def judged(attribute: Attribute, scenes: Mapping[int, tuple[Mapping[Attribute, Any], Any, Pixels | None]]) -> Reached:
    """Success and collateral over scenes: what each showed, what was wanted of it, and what came (None: it failed)."""
    after = {number: read(pixels) for number, (_, _, pixels) in scenes.items() if pixels is not None}
    done = sum(one[attribute] == scenes[number][1] for number, one in after.items())
    others: list[Attribute] = [name for name in VALUES if name != attribute]
    return Reached(
        success=done / len(scenes),
        collateral={
            name: sum(one[name] != scenes[number][0][name] for number, one in after.items()) / max(len(after), 1)
            for name in others
        },
        scenes=len(scenes),
        failed=len(scenes) - len(after),
    )
