"""What travels in an audit: a pair as read, what was seen of it, and findings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: dict[str, Severity] = {
    "missing": "error",
    "broken": "error",
    "prompt_empty": "error",
    "prompt_placeholder": "error",
    "duplicate_id": "error",
    "duplicate_pair": "error",
    "unchanged": "error",
    "misaligned": "error",
    "unrelated": "error",
    "swapped": "error",
    "off_by_one": "error",
    "split_leak": "error",
    "mask_empty": "error",
    "mask_size": "error",
    "mask_broken": "error",
    "mask_misses_change": "error",
    "mask_inverted": "error",
    "size_differs": "error",  # a warning where the aspect ratio is the same
    "alignment_undecided": "warning",
    "alignment_unrelated": "warning",
    "alignment_biased": "warning",
    "mirrored": "warning",
    "mask_full": "warning",
    "mask_gray": "warning",
    "prompts_equal": "warning",
    "prompt_brackets": "warning",
    "prompt_mojibake": "warning",
    "extension_differs": "warning",
    "path_differs": "warning",
    "swapped_suspect": "warning",
    "near_duplicate": "warning",
    "orphan": "warning",
    "variant": "note",
}
"""Every kind of finding, the worst first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One pair as read: nothing decoded."""

    id: str  # as the set calls it, for people; repeated ids are a finding
    shard: str
    index: int  # of the row in its shard
    part: Literal["", "rejected"] = ""  # the second result of a preference pair
    split: str = ""  # as folders and file names tell it
    source: bytes | None = None  # None: there is none
    edited: bytes | None = None
    mask: bytes | None = None
    wants_mask: bool = False  # whether the set has masks
    prompt: str | None = None  # None: the set has none
    source_prompt: str | None = None
    target_prompt: str | None = None
    turn: int | None = None
    paths: tuple[str, str] = ("", "")  # of source and result, as the set names their files
    elsewhere: str = ""  # files that stand under another path than the table has
    problem: str = ""  # why the row could not be read


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong with a row, or with a shard as a whole (`index` -1)."""

    id: str
    shard: str
    index: int
    finding: str
    detail: str = ""
    severity: Severity = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is kept of a pair once its pictures are gone: some hundred bytes."""

    id: str
    shard: str
    index: int
    part: str
    split: str
    turn: int | None
    prompt: str
    source: bytes = (
        b""  # digest of the pixels, 16 bytes; of the stored bytes where they cannot be decoded; b"": missing
    )
    edited: bytes = b""
    source_thumb: bytes = b""  # 16 x 16 levels of luma; b"" where there is no picture
    edited_thumb: bytes = b""
    hash: int | None = None  # dHash of the source, 64 bits
    findings: tuple[tuple[str, str], ...] = ()  # kind and detail
    figures: dict[str, float | str | None] = field(default_factory=dict)
