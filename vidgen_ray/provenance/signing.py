"""Sign files with a C2PA manifest, verify one, and make the keys for it. Needs the extra `c2pa`, and no network."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from vidgen_ray.errors import MediaError, SetupError, import_problem, install_command
from vidgen_ray.media.media_file import wrap_errors
from vidgen_ray.profile import ProvenanceSettings
from vidgen_ray.provenance.record import SOURCE_TYPE_URI, TOOL, Operation, ProvenanceRecord
from vidgen_ray.system.files import write_atomically

DAYS = 3650
PEM_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.+?-----END \1-----\n?", re.DOTALL)
RSA_ALGORITHM = "ps256"
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


class SigningKey(NamedTuple):
    """A private key with its certificates. Its text form does not contain the key."""

    algorithm: str
    """C2PA's name of the signature algorithm: es256, es384, es512, ps256 or ed25519."""
    private_key: str
    """PKCS #8 in PEM."""
    certificates: str
    """Certificate of the key, then those of its issuers, in PEM."""

    def __repr__(self) -> str:
        return f"SigningKey({self.algorithm})"


def read_signing_key(path: Path) -> SigningKey:
    """Read a key file. Raises SetupError if it cannot be used. Errors never contain the key."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509 import load_pem_x509_certificate

    try:
        blocks = [(match[1], match[0]) for match in PEM_BLOCK.finditer(path.read_text("ascii"))]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a PEM file"
        raise SetupError(f"C2PA key {path}: cannot be read ({reason}); `vidgen keys c2pa` makes one") from None
    keys = [text for kind, text in blocks if kind.endswith("PRIVATE KEY")]
    certificates = "".join(text for kind, text in blocks if kind == "CERTIFICATE")
    if len(keys) != 1 or not certificates:
        raise SetupError(f"C2PA key {path}: must be a PEM file with one private key and its certificates")
    try:
        key = load_pem_private_key(keys[0].encode(), None)
        certificate = load_pem_x509_certificate(certificates.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SetupError(f"C2PA key {path}: cannot be read; the private key must not be encrypted") from None
    if certificate.public_key() != key.public_key():
        raise SetupError(f"C2PA key {path}: its first certificate must be that of the private key")
    if (end := certificate.not_valid_after_utc) < datetime.now(UTC):
        raise SetupError(f"C2PA key {path}: its certificate was valid until {end:%Y-%m-%d}; make a new key")
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        return SigningKey(CURVES[key.curve.name], keys[0], certificates)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return SigningKey("ed25519", keys[0], certificates)
    if isinstance(key, rsa.RSAPrivateKey):
        return SigningKey(RSA_ALGORITHM, keys[0], certificates)
    raise SetupError(f"C2PA key {path}: must be an EC (P-256, P-384, P-521), Ed25519 or RSA key")


def read_certificates(path: Path) -> str:
    """Return the certificates of a PEM file. Raises SetupError if it has none."""
    try:
        found = "".join(match[0] for match in PEM_BLOCK.finditer(path.read_text("ascii")) if match[1] == "CERTIFICATE")
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not a PEM file'})") from None
    if not found:
        raise SetupError(f"{path}: has no certificate in PEM")
    return found


def create_signing_key(path: Path, organisation: str, now: datetime | None = None) -> Path:
    """Create a P-256 key with a certificate for C2PA, issued by an authority of its own. Return the file of the certificates.

    Only the owner may read `path`. The key of the authority is not kept, so it cannot issue another certificate. Raises
    SetupError if the file exists or cannot be written.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise SetupError(f"C2PA keys: {import_problem(error)}; {install_command('c2pa')}") from None

    if path.exists():
        raise SetupError(
            f"C2PA key {path}: exists; choose another file, since files signed with it can no longer be attributed"
        )
    now = now or datetime.now(UTC)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def name(common_name: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
                x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            ]
        )

    def certificate(
        subject: x509.Name, public_key: ec.EllipticCurvePublicKey, *, is_authority: bool
    ) -> x509.CertificateBuilder:
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
        usage = x509.KeyUsage(
            digital_signature=not is_authority,
            key_cert_sign=is_authority,
            crl_sign=is_authority,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name("vidgen-ray signing authority"))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            # Clocks of other machines may be slow.
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=DAYS))
            .add_extension(x509.BasicConstraints(is_authority, 0 if is_authority else None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(issuer_id, critical=False)
        )

    authority = certificate(name("vidgen-ray signing authority"), authority_key.public_key(), is_authority=True)
    leaf = certificate(name("vidgen-ray signing key"), key.public_key(), is_authority=False)
    # One of the usages that C2PA accepts for signers.
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    chain = b"".join(each.sign(authority_key, hashes.SHA256()).public_bytes(Encoding.PEM) for each in (leaf, authority))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public_file = path.with_name(f"{path.stem}.cert.pem")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The mode is set before there is a key in the file.
        path.touch(mode=0o600)
        path.write_bytes(private + chain)
        write_atomically(public_file, chain)
    except OSError as error:
        raise SetupError(f"C2PA key {path}: cannot be written ({error.strerror})") from None
    return public_file


RECORD_ASSERTION = "vidgen-ray.provenance"
UNTRUSTED = "signingCredential.untrusted"
"""Status of a signature whose certificate no trust anchor has issued: of every key that a user has made."""
ALTERING: tuple[Operation, ...] = ("upscale", "stage")
"""Operations that turn one file into another."""
_SETTINGS: dict[str, dict[str, Any]] = {
    # Thumbnails would show photos of people that a private record does not even name.
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}


class Ingredient(NamedTuple):
    """A file that the signed file was made from. Its own manifest, if it has one, is kept inside the new one."""

    path: Path
    title: str


class Signature(NamedTuple):
    """Result of verifying a file."""

    state: str
    """Trusted (issued by a trust anchor), Valid (unchanged, signer unknown) or Invalid."""
    problems: tuple[str, ...]
    """C2PA's codes of what is wrong, such as `assertion.bmffHash.mismatch`. An unknown signer is not a problem."""
    signer: str
    """Organisation that the certificate names."""
    actions: tuple[str, ...]
    ingredients: tuple[str, ...]
    """Titles of the files that it was made from."""


def check_signing(settings: ProvenanceSettings) -> None:
    """Raise SetupError if files are to be signed, and the package or the key is not there."""
    if settings.signing_key is not None:
        _c2pa()
        read_signing_key(settings.signing_key)


def sign_file(path: Path, record: ProvenanceRecord, key: Path, ingredients: Sequence[Ingredient] = ()) -> None:
    """Sign a PNG, MP4 or MOV file in place. Raises SetupError without the package or the key, and MediaError."""
    c2pa = _c2pa()
    signing_key = read_signing_key(key)
    info = c2pa.C2paSignerInfo(
        alg=signing_key.algorithm.encode(),
        sign_cert=signing_key.certificates.encode(),
        private_key=signing_key.private_key.encode(),
        ta_url=None,
    )
    kind = _media_type(path)
    relationship = "parentOf" if record.operation in ALTERING else "componentOf"
    signed = path.with_name(f"{path.name}.signed")
    try:
        with (
            wrap_errors(f"{path}: cannot be signed"),
            c2pa.Signer.from_info(info) as signer,
            c2pa.Context.from_dict(_SETTINGS) as context,
            c2pa.Builder(json.dumps(_manifest(record, ingredients)), context) as builder,
        ):
            for number, ingredient in enumerate(ingredients):
                stated = {"title": ingredient.title, "relationship": relationship, "label": _ingredient_id(number)}
                with ingredient.path.open("rb") as source:
                    builder.add_ingredient(json.dumps(stated), _media_type(ingredient.path), source)
            with path.open("rb") as source, signed.open("w+b") as target:
                builder.sign(signer, kind, source, target)
        os.chmod(signed, path.stat().st_mode)
        os.replace(signed, path)
    finally:
        signed.unlink(missing_ok=True)


def sign_result(path: Path, record: ProvenanceRecord | None, settings: ProvenanceSettings, source: Path | None) -> None:
    """Sign a new file in place, if files are signed, with the file that it was made from as its parent.

    A file that cannot be signed is deleted. Raises what `sign_file` raises.
    """
    if record is None or settings.signing_key is None:
        return
    ingredients = [] if source is None or _known_type(source) is None else [Ingredient(source, source.name)]
    try:
        sign_file(path, record, settings.signing_key, ingredients)
    except Exception:
        path.unlink(missing_ok=True)
        raise


def _manifest(record: ProvenanceRecord, ingredients: Sequence[Ingredient]) -> dict[str, Any]:
    agent = {"name": TOOL, "version": record.version}
    of_type = {"digitalSourceType": f"{SOURCE_TYPE_URI}{record.source_type}"} if record.source_type else {}
    ids = [_ingredient_id(number) for number in range(len(ingredients))]
    if record.operation in ALTERING and ids:
        actions = [
            {"action": "c2pa.opened", "parameters": {"ingredientIds": ids}},
            {"action": "c2pa.edited", "softwareAgent": agent, **of_type},
        ]
    else:
        actions = [{"action": "c2pa.created", "softwareAgent": agent, **of_type}]
        actions += [{"action": "c2pa.placed", "parameters": {"ingredientIds": [each]}} for each in ids]
    return {
        "claim_generator_info": [agent],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": RECORD_ASSERTION, "data": record.model_dump(mode="json", exclude_none=True)},
        ],
    }


def _ingredient_id(number: int) -> str:
    return f"ingredient-{number}"


def read_signature(path: Path, trust_anchors: str | None = None) -> Signature | None:
    """Verify the newest manifest of a file. Return `None` if the file has none.

    `trust_anchors`: certificates in PEM of the issuers that are trusted. Raises SetupError without the package, MediaError.
    """
    c2pa = _c2pa()
    settings: dict[str, Any] = {"verify": {**_SETTINGS["verify"], "verify_trust": True}}
    if trust_anchors is not None:
        settings["trust"] = {"trust_anchors": trust_anchors}
    with wrap_errors(f"{path}: cannot be verified"), c2pa.Context.from_dict(settings) as context, path.open("rb") as file:
        reader = c2pa.Reader.try_create(_media_type(path), file, context=context)
        if reader is None:
            return None
        with reader:
            return _signature(json.loads(reader.json()))


def _signature(store: dict[str, Any]) -> Signature:
    manifest = store["manifests"][store["active_manifest"]]
    found = {status["code"] for status in store.get("validation_status", ())}
    actions = [
        action["action"]
        for assertion in manifest.get("assertions", ())
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ]
    return Signature(
        state=store["validation_state"],
        problems=tuple(sorted(found - {UNTRUSTED})),
        signer=manifest.get("signature_info", {}).get("issuer", "unknown"),
        actions=tuple(actions),
        ingredients=tuple(each.get("title", "untitled") for each in manifest.get("ingredients", ())),
    )


def _c2pa() -> Any:
    try:
        import c2pa
    except ImportError as error:
        raise SetupError(f"C2PA signatures: {import_problem(error)}; {install_command('c2pa')}") from None
    return c2pa


def _media_type(path: Path) -> str:
    kind = _known_type(path)
    if kind is None:
        raise MediaError(f"{path}: C2PA has no signatures for this format, must be PNG, JPEG, WebP, MP4 or MOV")
    return kind


def _known_type(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(12)
    if start.startswith(b"\x89PNG"):
        return "image/png"
    if start.startswith(b"\xff\xd8"):
        return "image/jpeg"
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return "image/webp"
    if start[4:8] == b"ftyp":
        return "video/quicktime" if start[8:] == b"qt  " else "video/mp4"
    return None
