"""Keys for C2PA signatures: one PEM file with the private key and its certificates. Needs the extra `c2pa`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from vidgen_ray.atomic_files import write_atomically
from vidgen_ray.errors import SetupError

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
    except ImportError:
        raise SetupError("C2PA keys need the package cryptography: pip install 'vidgen-ray[c2pa]'") from None

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
