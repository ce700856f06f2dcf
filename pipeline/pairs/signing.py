"""C2PA: results signed as edited by a model, their inputs named as what they were made from (extra `c2pa`).

A signature has a time, so that signed bytes differ from one signing to the next. It is the last change of the bytes.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pipeline
from pipeline.common.showing import describe
from pipeline.errors import EncodeError, RecipeError
from pipeline.pairs.marks import SOURCE_TYPE
from pipeline.writing.rows import format_of

Algorithm = Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]
MIME = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signing:
    """Whose signature. The key is read from its file, and written nowhere."""

    certificates: str  # file with the chain in PEM, the signer's own first
    key: str  # file with the private key in PEM
    algorithm: Algorithm = "es256"
    time_authority: str = ""  # URL of a server of RFC 3161 that confirms the time; "": the time is ours


class Signer:
    """Signs pictures.

    Raises:
        RecipeError: the library is not installed, or the certificates or the key cannot be used.
    """

    def __init__(self, signing: Signing) -> None:
        if find_spec("c2pa") is None:
            raise RecipeError("export", [("sign", "the library is not installed. Install shardedit[c2pa]")])
        import c2pa

        try:
            info = c2pa.C2paSignerInfo(
                signing.algorithm.encode(),
                Path(signing.certificates).read_bytes(),
                Path(signing.key).read_bytes(),
                signing.time_authority.encode() or None,
            )
            self._signer = c2pa.Signer.from_info(info)
        except Exception as error:  # OSError, or what the library makes of a key that is none
            raise RecipeError(
                "export", [("sign", f"the certificates or the key cannot be used: {describe(error)}")]
            ) from error

    def sign(self, image: bytes, source: bytes) -> bytes:
        """The image with a manifest that says how it was made from its source.

        Raises:
            EncodeError: it cannot be signed.
        """
        import c2pa

        signed = io.BytesIO()
        try:
            builder = c2pa.Builder(json.dumps(_manifest()))
            if (kind := MIME.get(format_of(source))) is not None:
                builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
                about = {"title": "input", "relationship": "parentOf"}
                builder.add_ingredient(json.dumps(about), kind, io.BytesIO(source))
            else:  # which the library cannot take as what the result was made from
                made = c2pa.C2paDigitalSourceType.COMPOSITE_WITH_TRAINED_ALGORITHMIC_MEDIA
                builder.set_intent(c2pa.C2paBuilderIntent.CREATE, made)
            builder.sign(self._signer, MIME[format_of(image)], io.BytesIO(image), signed)
        except Exception as error:
            raise EncodeError(f"an image cannot be signed: {describe(error)}") from error
        return signed.getvalue()


def _manifest() -> dict[str, Any]:
    edited = {"action": "c2pa.edited", "digitalSourceType": SOURCE_TYPE}
    return {
        "claim_generator_info": [{"name": "shardedit", "version": pipeline.__version__}],
        "title": "edited image",
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [edited]}}],
    }
