"""The certificate of one night: its scheduler, workers and client know each other by it, and nobody else."""

from datetime import UTC, datetime
from typing import Any

# The certificate is for one night. What limits it is that no other process has the key, not the time.
FROM = datetime(1970, 1, 2, tzinfo=UTC)
UNTIL = datetime(2100, 1, 1, tzinfo=UTC)
NAME = "autoresearch"


def make_certificate() -> dict[str, str]:
    """Return a new key and a certificate that it signed itself, as PEM: {"key": ..., "cert": ...}.

    That of dask (Security.temporary) is valid from now on: a host whose clock is behind would refuse it.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(FROM)
        .not_valid_after(UNTIL)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return {
        "key": secret.decode(),
        "cert": certificate.public_bytes(serialization.Encoding.PEM).decode(),
    }


def make_security(certificate: dict[str, str]) -> Any:
    """Return dask's Security in which all roles have one certificate, and which takes no other."""
    from distributed.security import Security

    roles = {
        f"tls_{role}_{part}": certificate[part]
        for role in ("client", "scheduler", "worker")
        for part in ("key", "cert")
    }
    return Security(require_encryption=True, tls_ca_file=certificate["cert"], **roles)
