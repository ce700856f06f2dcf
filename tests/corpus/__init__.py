"""Broken and hostile inputs, made by a script: archives, tables, pictures, texts, recipes, places, checkpoints, runs.

    python -m tests.corpus        # sends them all through shardedit and prints how each kind ends

Rows and shards (`whole_runs.py`) are edited, a folder for each format of source: each must end edited or quarantined,
and its sound neighbours edited. Situations (`commands.py`) are met by the commands: each must be refused by name, or
put right.
"""

from tests.corpus.archives import archive_cases
from tests.corpus.folders import folder_files
from tests.corpus.making import FORMATS, PNG, Case, Member, row_case, tar
from tests.corpus.pictures import picture_cases, text_cases
from tests.corpus.tables import table_cases
from tests.corpus.whole_runs import Ends, recipe_of, run_corpus

__all__ = [
    "FORMATS",
    "PNG",
    "Case",
    "Ends",
    "Member",
    "archive_cases",
    "folder_files",
    "picture_cases",
    "recipe_of",
    "row_case",
    "run_corpus",
    "table_cases",
    "tar",
    "text_cases",
]
