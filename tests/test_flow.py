"""One image on its way through `pipeline/flow.py`: what is never handed out."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pipeline import Editor
from pipeline.editing.ledits_pp import LEditsPP
from pipeline.errors import EditError, InvertError
from pipeline.inversion.ddpm import DDPMInversion

PICTURE = (np.random.default_rng(0).random((40, 56, 3)) * 255).astype(np.uint8)


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=repr)
def test_values_that_are_not_finite_fail_their_stage(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(make: Any) -> Any:
        def run(*given: Any) -> Any:
            made = yield from make(*given)
            latents = made.latents.clone()
            latents.view(-1)[0] = value
            return dataclasses.replace(made, latents=latents)

        return run

    editor = Editor.load("analytic")
    for method, name, error in ((LEditsPP, "edit", EditError), (DDPMInversion, "invert", InvertError)):
        monkeypatch.setattr(method, name, spoilt(getattr(method, name)))
        with pytest.raises(error, match="gave values that are not finite"):
            editor.edit(PICTURE, "hat", inversion={"method": "ddpm", "num_steps": 2})
