"""Templates of the pages that are written."""

from __future__ import annotations

from functools import cache

import jinja2

from pipeline.common.wording import breakable, shown


@cache
def page_template(path: str, package: str = "pipeline.looking") -> jinja2.Template:
    """The template at a path of `looking/`, or of another package; it includes others of `looking/` by theirs."""
    # Names, captions, prompts and messages come from outside: autoescape is what keeps them text.
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(one, ".") for one in dict.fromkeys((package, "pipeline.looking"))]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    return environment.get_template(path)
