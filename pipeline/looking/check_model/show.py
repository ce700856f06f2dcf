"""The check as it is typed: answers as they come, then the verdict and where the page is; or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.common.showing import about_path, describe
from pipeline.errors import SourceError
from pipeline.looking.check_model.records import Check
from pipeline.looking.check_model.run import check_model, recipe_for
from pipeline.looking.printing import out

STATUS_WIDTH = len("not applicable")
NAME_WIDTH = len("autoencoder")
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "not applicable": "dim"}


def check_and_show(
    model: str,
    overrides: Sequence[str],
    folder: Path,
    *,
    image: Path | None,
    prompt: str,
    num_steps: int,
    device: str | None,
    strict: bool,
    as_json: bool,
) -> int:
    """Check a model and print what was found; returns the exit code.

    Raises:
        SourceError: the image's file cannot be read.
        ShardeditError: what `check_model` and `recipe_for` raise.
    """
    recipe = recipe_for(model, overrides)
    found = check_model(
        recipe.model,
        None if image is None else _read(image),
        folder,
        prompt=prompt,
        num_steps=num_steps,
        seed=recipe.run.seed,
        call_size=recipe.run.call_size,
        device=device,
        on_check=(lambda _: None) if as_json else show_answer,
    )
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        out.print(f"{found.verdict}: {model}", markup=False)
        out.print(f"Open {found.page} in a browser; {found.json} holds the same as JSON.", markup=False)
    return found.exit_code(strict=strict)


def show_answer(check: Check) -> None:
    """An answer in a line or two."""
    facts = "; ".join(f"{label}: {value}" for label, value in check.facts[:2])
    out.print(f"{check.status:<{STATUS_WIDTH}}  ", style=COLOURS[check.status], markup=False, end="")
    out.print(f"{check.name:<{NAME_WIDTH}}  {facts if check.status == 'ok' and facts else check.text}", markup=False)


def _read(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise SourceError(
            f"--image {image} cannot be read: {about_path(error) or describe(error)}. Check it"
        ) from error
