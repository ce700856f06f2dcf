"""C2PA: a signed result is read back by the library itself, with its source and how it was made."""

from __future__ import annotations

import datetime
import io
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import EncodeError, RecipeError
from pipeline.pairs import signing
from pipeline.pairs.marks import SOURCE_TYPE, marked, packet
from pipeline.pairs.signing import Signer, Signing


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signing:
    """A certificate with its authority, of today."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    today = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [
        x509.Name(
            [x509.NameAttribute(x509.NameOID.COMMON_NAME, one), x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, one)]
        )
        for one in ("authority", "signer")
    ]
    pem = b""
    for at in (1, 0):
        usage = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(names[at])
            .issuer_name(names[0])
            .public_key(keys[at].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - datetime.timedelta(days=1))
            .not_valid_after(today + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=at == 0, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=at == 1, key_cert_sign=at == 0, crl_sign=at == 0, **usage),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[at].public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
        )
        if at == 1:
            purpose = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
            certificate = certificate.add_extension(purpose, critical=True)
        pem += certificate.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (folder / "chain.pem").write_bytes(pem)
    (folder / "key.pem").write_bytes(
        keys[1].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return Signing(certificates=str(folder / "chain.pem"), key=str(folder / "key.pem"))


def saved(kind: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_signed_result_names_its_source_and_keeps_its_pixels_and_mark(signer, kind):
    c2pa = pytest.importorskip("c2pa")
    image = marked(saved(kind, 0), packet({}, tool="t", model="m", version=""))
    signed = Signer(signer).sign(image, saved("PNG", 1))
    opened = Image.open(io.BytesIO(signed))
    assert np.array_equal(np.asarray(opened), np.asarray(Image.open(io.BytesIO(image))))
    assert SOURCE_TYPE.encode() in opened.info["xmp"]
    read = json.loads(c2pa.Reader(f"image/{kind.lower()}", io.BytesIO(signed)).json())
    manifest = read["manifests"][read["active_manifest"]]
    assert [one["relationship"] for one in manifest["ingredients"]] == ["parentOf"]
    (actions,) = [one["data"]["actions"] for one in manifest["assertions"] if one["label"].startswith("c2pa.actions")]
    edited = [one for one in actions if one["action"] == "c2pa.edited"]
    assert [one["digitalSourceType"] for one in edited] == [SOURCE_TYPE]
    assert not {"assertion.dataHash.mismatch", "claimSignature.mismatch"} & {
        one["code"] for one in read.get("validation_status", ())
    }
    Signer(signer).sign(image, saved("BMP", 1))
    with pytest.raises(EncodeError, match="cannot be signed"):
        Signer(signer).sign(b"no image", saved("PNG", 1))


def test_a_key_that_is_none_is_refused_before_a_run_is_read(signer, tmp_path):
    pytest.importorskip("c2pa")
    (tmp_path / "key.pem").write_text("PLANTED-KEY")
    with pytest.raises(RecipeError, match="sign: the certificates or the key cannot be used") as refused:
        Signer(Signing(certificates=signer.certificates, key=str(tmp_path / "key.pem")))
    assert "PLANTED-KEY" not in str(refused.value)


def test_without_the_library_or_the_key_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(signing, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"Install shardedit\[c2pa\]"):
        Signer(Signing(certificates="a", key="b"))
    asked = ["export", str(tmp_path), "--out", str(tmp_path / "set"), "--sign-key", "key.pem"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2
    assert "takes both --sign-certificates and --sign-key" in done.output
