"""What cannot work of a recipe's gates and attempts: told before the run, with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pipeline.settings.explain import problems_in_words
from pipeline.settings.gain import compared_texts
from pipeline.settings.gates import NEEDS, PROMPTS_OF, WAYS_OUT

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

Problem = tuple[str, str]
"""A key's path, and what is wrong with it."""


def gate_problems(recipe: Recipe) -> Iterator[Problem]:
    """Gates that nothing could ever be judged by: they would let everything pass."""
    gates = recipe.gates
    if recipe.instructions is not None and recipe.instructions.rewritten and (gates is None or gates.judge is None):
        yield "instructions.rewritten", f"needs who rewrites. Set gates.judge to {WAYS_OUT['judge']}; or it to false"
    if gates is None:
        return
    yield from gates.problems(round_trip=recipe.sink.round_trip)
    for name, method in recipe.all_methods.items():
        if gates.inversion_psnr is not None and "path" not in method.inversion.provides:
            text = f"a trajectory of inversion.method '{method.inversion.method}' cannot be replayed"
            yield "gates.inversion_psnr", f"{text} (method '{name}'). Set it to null, or choose another inversion"
    for edit, request in recipe.edits.items():
        if recipe.measures_gain and compared_texts(request) is None:
            text = "denoise_gain compares two texts, and this edit has no target_prompt and no concepts"
            way_out = "Give one, or set gates.denoise_gain to null and best_of.rank_by to another figure"
            yield f"edits.{edit}", f"{text}. {way_out}"
        missing = {
            "source_prompt": not request.source_prompt and not recipe.source.caption_is_source_prompt,
            "target_prompt": not request.target_prompt,
        }
        for gate, prompts in PROMPTS_OF.items():
            for prompt in prompts:
                if gate in gates.gates and missing[prompt]:
                    text = f"gates.{gate} compares with the {prompt}, and this edit has none"
                    yield f"edits.{edit}", f"{text}. Give {prompt}, or set gates.{gate} to null"


def attempt_problems(recipe: Recipe) -> Iterator[Problem]:
    """Attempts that could not be made, or from which none could be chosen."""
    config = recipe.best_of
    if config is None:
        return
    if recipe.gates is None:
        yield "best_of", "chooses among results by their gates, and there are none. Add a section gates"
    elif config.rank_by is not None and (need := NEEDS.get(config.rank_by)) and getattr(recipe.gates, need) is None:
        yield "best_of.rank_by", f"nothing measures {config.rank_by}. Set gates.{need} to {WAYS_OUT[need]}"
    if len(config.vary) >= config.attempts:
        text = f"has {len(config.vary)} variations for {config.attempts - 1} attempts after the first"
        yield "best_of.vary", f"{text}. Raise attempts, or leave some out"
    for number in range(config.variations):
        for path, text in _variation_problems(recipe, number + 1):
            yield ".".join(filter(None, ("best_of.vary", str(number), path))), text


def _variation_problems(recipe: Recipe, attempt: int) -> Iterator[Problem]:
    try:
        methods = recipe.methods_of(attempt)
    except ValidationError as error:
        (method, *_) = recipe.all_methods.values()
        yield from problems_in_words(error, type(method))
        return
    for method in methods.values():
        inversion, editing = method.inversion, method.editing
        if not editing.fits(type(inversion)):
            yield "", f"editing.method '{editing.method}' cannot work with inversion.method '{inversion.method}'"
            continue
        yield from (("", problem) for problem in editing.pair_problems(inversion))
        for edit, request in recipe.edits.items():
            follows = recipe.source.caption_is_source_prompt and not request.source_prompt
            for problem in editing.problems(request, inversion, caption_follows=follows):
                yield "", f"{problem.text} (edit '{edit}')"
