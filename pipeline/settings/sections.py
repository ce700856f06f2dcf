"""The recipe's sections other than inversion and editing: source, model, sink, run. None takes an unknown key.

A key's docstring is its description: in `shardedit schema`, in docs/recipe.md, in an editor that knows the schema.
"""

from __future__ import annotations

import os
import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator


def _that_a_system_takes(path: str) -> str:
    """A path or URL as given.

    Raises:
        ValueError: it is empty, or holds what no path may.
    """
    if not path.strip():
        raise ValueError("is empty. Give a path or URL")
    if "\0" in path:
        raise ValueError("holds a NUL, which no path may")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which no path may") from None
    return path


StorageOptions = dict[str, Any]
Location = Annotated[str, AfterValidator(_that_a_system_takes)]
Count = Annotated[int, Field(ge=1)]
OneOrMany = Annotated[  # the schema says what may be written, the type what is made of it
    tuple[Location, ...],
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


SIZE_TEXT = r"([0-9]{1,12}(?:\.[0-9]{1,12})?) *([kMG])B"


def _or_size_text(schema: dict[str, Any]) -> None:
    """In the JSON schema: a number of bytes, or text such as "500MB"."""
    number = {name: schema.pop(name) for name in ("type", "minimum")}
    schema["anyOf"] = [number, {"type": "string", "pattern": f"^{SIZE_TEXT}$"}]


class Section(BaseModel):
    """Base of the recipe's sections: immutable, and unknown keys are refused."""

    # A misplaced secret must not stand in an error's traceback.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, hide_input_in_errors=True
    )


class SourceConfig(Section):
    """Where the images are, and which parts of a row hold what."""

    shards: OneOrMany = Field(min_length=1)
    """One or several fsspec URLs, globs allowed; a folder or prefix means all below it."""
    format: Literal["auto", "webdataset", "parquet", "folder", "sets"] = "auto"
    """How the shards are read; auto: by the names found. sets: JSON lines, each a set of images of one subject, for
    editing.method consistory."""
    scenes_per_row: int = Field(default=8, ge=1, le=1024)
    """Scenes of a set that one row holds. A unit commits run.unit_size rows; each makes the set's anchors anew."""
    image: str | None = None
    """Member extension or column with the image; none: the first that holds one."""
    caption: str = "txt"
    """Member extension or column with the caption; rows without one have ""."""
    caption_is_source_prompt: bool = False
    """Take the caption for the source prompt of edits that have none."""
    mask: str | None = None
    """Member extension or column with the user's mask: white, or 1 of the labels 0 and 1, is where an edit may act.
    None: mask.png, or a column named mask."""
    edit: str = "edit"
    """Key of the json member, or column, with the row's own edit request; "edits" is always tried too."""
    storage_options: StorageOptions = Field(default_factory=dict, repr=False)
    """Options for the fsspec file system. Secrets belong in the environment."""
    max_pixels: int = Field(default=64_000_000, ge=1)
    """Pixels of an image; larger ones are quarantined before they are decoded."""
    max_member_bytes: int = Field(default=256 * 2**20, ge=1)
    """Bytes of a member; larger ones are quarantined unread."""
    decode_seconds: int = Field(default=30, ge=1)
    """Seconds of CPU time that decoding an image or a mask may take; what takes longer is quarantined. 64 megapixels
    take 1 to 5."""
    decode_memory: int = Field(default=1536 * 2**20, ge=64 * 2**20)
    """Bytes of memory that decoding an image or a mask may take; what needs more is quarantined. 64 megapixels take 0.5
    to 1.2 GiB."""
    read_memory: int = Field(default=4 * 2**30, ge=256 * 2**20)
    """Bytes of memory that reading a Parquet file may take; a row group that needs more is quarantined. Its largest
    page decides: 1,024 rows in files of many writers."""
    max_row_concepts: int = Field(default=256, ge=1)
    """Concepts that a row's own edits may have together; each costs network rows."""
    check: Literal["auto", "content"] = "auto"
    """How a later start sees that a shard is what the run began with. auto: by the store's entity tag; a local file by
    its size and a look at 64 kB of it, not by its time. content: by all its bytes, which every start then reads."""

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class ModelConfig(Section):
    """Which checkpoint, at which size and precision."""

    name: Location = Field(default="demo", min_length=1)
    """The bundled "demo" and "demo_flow", of diffusion and of flow matching, which know drawn faces only; the
    closed-form "analytic"; a local folder; a hub id; or "none", where no method reads a model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; none: its main branch."""
    variant: str | None = None
    """Variant of the weight files, such as fp16; none: the plain ones."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the networks; auto: bfloat16 on a GPU, float32 elsewhere."""
    size: int | None = Field(default=None, ge=32, le=4096)
    """Side of the model's square (crop, pad, stretch), or of the square with a bucket's area, in pixels; none: the
    checkpoint's."""
    fit: Literal["crop", "pad", "stretch", "bucket"] = "pad"
    """How an image of another shape is brought to the model. crop: the centred square; pad: scaled to fit, edges
    replicated; stretch: scaled, whatever the shape; bucket: the image's own shape at about that area."""
    empty_prompt: Literal["auto", "zeros", "encoded"] = "auto"
    """What stands for an empty prompt in Stable Diffusion XL, in inversion and edit alike. zeros: zeros; encoded: what
    the text encoders make of it; auto: zeros where the checkpoint says force_zeros_for_empty_prompt."""
    text_tokens: int | None = Field(default=None, ge=8, le=512)
    """Places of the T5 text encoder of Stable Diffusion 3 and FLUX.1, and of FLUX.2's text encoder. Padding is part of
    what these networks read, so another number gives other images. None: 256, and 512 for FLUX.1-dev and FLUX.2. Of
    Qwen-Image, which reads no padding: places of a prompt, a longer one being refused; none: 256."""
    t5: bool = True
    """Load the T5 text encoder of Stable Diffusion 3. False: zeros stand for what it would say, which saves 9.5 GB in
    bfloat16 and loses writing and fine detail of prompts."""
    embedded_guidance: float | None = Field(default=None, ge=0, le=100)
    """Guidance scale that a guidance-distilled network (FLUX.1-dev) is told wherever a method does not say its own.
    None: 1, which inverts best; 3.5 is usual for text to image. It is no classifier-free guidance, which methods have
    beside it."""
    offload: Literal["none", "components", "layers"] = "none"
    """What leaves the device while it is not wanted, where memory asks for it. components: text encoders and the
    network take turns; layers: the network's blocks come one by one besides, which costs their way to the device in
    every call. Results stay the same. `shardedit plan` says what each needs."""
    text_8bit: bool = False
    """Load the T5 text encoder of Stable Diffusion 3 and FLUX in 8 bit, by bitsandbytes, on a GPU: half of its memory.
    Changes results a little."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the UNet with torch: faster calls, minutes at the start; changes how results are rounded. auto: on a GPU
    kernels, layouts, compiled code and CUDA graphs are tried, and the fastest taken (`run.json` says which); on a CPU
    and with offload as false, which runs the network as it is loaded."""

    @model_validator(mode="after")
    def _something_to_compile(self) -> ModelConfig:
        if self.compile is True and self.name in ("analytic", "none"):
            raise ValueError(f"model.name {self.name} has no networks to compile. Leave compile out")
        if self.compile is True and self.offload != "none":
            raise ValueError(
                f"a compiled network keeps its place on the device, and offload {self.offload} moves it. Leave out one"
            )
        return self

    @property
    def caveat(self) -> str:
        """What a user of this model must know, or ""."""
        if self.name not in ("demo", "demo_flow"):
            return ""
        return "the demo model knows drawn faces only; model.name chooses another"


COLUMN_NAMES: dict[str, dict[str, str]] = {
    "full": {},
    # As `datasets` names them in InstructPix2Pix, and diffusers' train_instruct_pix2pix.py reads them unasked.
    "instructpix2pix": {"input": "input_image", "instruction": "edit_prompt", "image": "edited_image"},
}
"""Presets of `sink.columns`: other names for some of our columns. One that names `input` keeps it."""


class FolderSink(Section):
    """Where the results of a study go."""

    folder: Location = Field(min_length=1)
    """fsspec URL; created where missing."""
    storage_options: StorageOptions = Field(default_factory=dict, repr=False)
    """Options for the fsspec file system. Secrets belong in the environment."""


class SinkConfig(Section):
    """Where results go, and what a result holds."""

    folder: Location = Field(min_length=1)
    """fsspec URL of the output; created where missing."""
    format: Literal["parquet", "webdataset"] = "parquet"
    """What results are written as."""
    include_input: bool = False
    """Keep the input image beside the edited one: its own bytes, as the source holds them."""
    columns: Literal["full", "instructpix2pix"] = "full"
    """Names of the columns; instructpix2pix: `input_image`, `edit_prompt` and `edited_image`, as its trainers read
    them, beside all others; the input is kept."""
    image_format: Literal["png", "jpg", "webp"] = "png"
    """Format of the edited image; masks are always lossless."""
    quality: int = Field(default=95, ge=1, le=100)
    """Quality of jpg and webp; 100: best."""
    background: Literal["result", "input"] = "result"
    """What stands outside of an edit's masks. result: what the model made of it; input: the input's own pixels, at its
    own size, with an edge two cells of the latents wide in which one becomes the other. Results without a mask go to
    quarantine."""
    round_trip: bool = True
    """Measure against the input's own way through the autoencoder and back: `reconstruction_psnr`, `edit_change` and
    `rest_change`. It takes one decoding more per image; false: these figures are null."""
    shard_size: int = Field(default=500_000_000, ge=0, json_schema_extra=_or_size_text)
    """Bytes of an output file, about; "500MB" may be written. 0: each unit keeps a file of its own."""
    storage_options: StorageOptions = Field(default_factory=dict, repr=False)
    """Options for the fsspec file system. Secrets belong in the environment."""

    @property
    def column_names(self) -> dict[str, str]:
        """Names of columns that are not our own, by our own."""
        return COLUMN_NAMES[self.columns]

    @property
    def keeps_input(self) -> bool:
        """Whether the whole input stands beside the result."""
        return self.include_input or "input" in self.column_names

    @field_validator("shard_size", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if match := re.fullmatch(SIZE_TEXT, value):
            return round(Decimal(match[1]) * {"k": 10**3, "M": 10**6, "G": 10**9}[match[2]])
        raise ValueError(f"should be bytes as a whole number, or a text like 500MB or 1.5GB, is the text {value!r}")


class WorkerRange(Section):
    """A pool that grows as nodes come and shrinks as they go."""

    min: Count
    """Workers at least: so many must fit into the cluster, as it is or as its autoscaler can make it."""
    max: Count
    """Workers at most."""

    @model_validator(mode="after")
    def _is_a_range(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class RunConfig(Section):
    """Seed, units of work, workers, error budgets."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the run; an image's noise derives from it and from the image's id."""
    unit_size: int = Field(default=32, ge=1, le=4096)
    """Images that are committed together. A kill loses what is at work: two units per worker at most."""
    call_size: Count | Literal["auto"] = "auto"
    """Rows of a network call; auto: probed on a GPU, 16 on CPU. Changes how results are rounded."""
    images_in_flight: Count | Literal["auto"] = "auto"
    """Images at work at once, per worker; auto: what keeps calls full. Bounds memory."""
    engine: Literal["ray", "local"] = "ray"
    """Where the work runs; local: one process, for small runs and debugging, with the same bytes."""
    workers: Count | Literal["auto"] | WorkerRange = "auto"
    """Processes, a model in each; auto: one per GPU, one on CPU. With min and max, on Ray, as many as there is room for
    at the time: nodes may come and go. Results do not depend on it."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs that a worker reserves, or a share of one; auto: 1 where the cluster has GPUs, else 0."""
    max_failed_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of the results asked for that may fail; more ends the run early, or fails it at its end."""
    max_consecutive_failed_units: int = Field(default=5, ge=1)
    """Units in a row without a single result that end the run; max_failed_fraction is judged from so many units on,
    and at the end."""

    @field_validator("call_size", "images_in_flight", "workers", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:  # one message, where the union would give one for each of its types
            raise ValueError("should be 'auto' or at least 1")
        return value

    @field_validator("gpus_per_worker", mode="before")
    @classmethod
    def _not_negative(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and value < 0:
            raise ValueError("should be 'auto' or at least 0")
        return value
