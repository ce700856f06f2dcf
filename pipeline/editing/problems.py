"""What several editors cannot serve, said once for all of them."""

from __future__ import annotations

from pipeline.inversion.base import Inversion


def guidance_problem(guidance_scale: float, inversion: Inversion) -> str | None:
    """Null-text embeddings are optimised for one guidance scale, and serve no other."""
    optimised_for = getattr(inversion, "edit_guidance_scale", None)
    if optimised_for is None or optimised_for == guidance_scale:
        return None
    return (
        f"guidance_scale is {guidance_scale:g}, but inversion.method '{inversion.method}' optimises for "
        f"edit_guidance_scale {optimised_for:g}. Set both to the same"
    )


def negative_prompt_problem(inversion: str) -> str:
    """An inversion that brings unconditional embeddings leaves a negative prompt no place."""
    return (
        f"the {inversion} inversion brings an unconditional embedding of its own, which the edit's negative_prompt "
        "would replace. Leave negative_prompt out, or use another inversion"
    )
