"""What is asked of a row: its own edits, or the job's. Found out once, before its image is looked at."""

from __future__ import annotations

from pipeline.errors import PrepareError, RowError, Stage
from pipeline.recipe import Recipe, parse_edits
from pipeline.records import Asked, EditRequest, Refusal
from pipeline.samples import ReadRow, Sample, Unreadable

MAX_PROMPT = 2000  # characters of a caption that become a prompt; a text encoder reads about 300


def asked_of(row: ReadRow, recipe: Recipe) -> Asked:
    """A row and what is asked of it; one that cannot be read or understood is refused, with the reason."""
    unknown = tuple(recipe.edits) or ("",)
    if isinstance(row, Unreadable):
        refusal = Refusal(stage="read", error_class=row.error_class, message=row.message)
        return Asked(sample=row.sample, edits=unknown, refusal=refusal)
    try:
        requests = requests_of(row, recipe)
    except Exception as error:
        return Asked(sample=row, edits=unknown, refusal=refusal_by(error, "prepare"))
    return Asked(sample=row, edits=tuple(requests), requests=requests)


def refusal_by(error: Exception, stage: Stage) -> Refusal:
    """What an error prevents. A `RowError` knows its own stage."""
    return Refusal(
        stage=error.stage if isinstance(error, RowError) else stage,
        error_class=type(error).__name__,
        message=str(error),
        error=error,
    )


def requests_of(sample: Sample, recipe: Recipe) -> dict[str, EditRequest]:
    """What to change in an image, by edit name: the row's own requests, else the job's.

    Raises:
        PrepareError: the row's request cannot be understood, or there is none at all.
    """
    if sample.edits is not None:
        requests = parse_edits(sample.edits, f"the row's '{recipe.source.edit}'", recipe.source.max_row_concepts)
    else:
        requests = dict(recipe.edits)
    if not requests:
        raise PrepareError(
            f"no usable edit: the row has none under '{recipe.source.edit}', and the recipe has no edits. "
            "Give one of them"
        )
    caption = sample.caption.strip()[:MAX_PROMPT].strip()
    if not recipe.source.caption_is_source_prompt or not caption:
        return requests
    return {
        name: request if request.source_prompt else request.model_copy(update={"source_prompt": caption})
        for name, request in requests.items()
    }
