"""Certificates, tokens and kubeconfigs of the test cluster: made anew for each one."""

from __future__ import annotations

import datetime
import ipaddress
import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.cluster.place import API, API_SERVICE, GATEWAY, KUBECONFIG, NODES, PKI, RUN

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
VALID = datetime.timedelta(days=365)
"""The operators' rotators replace, in silence, what is valid for less than 90 days."""

USERS = {
    "admin": ("admin", "system:masters"),
    "kube-controller-manager": ("system:kube-controller-manager", ""),
    "kube-scheduler": ("system:kube-scheduler", ""),
    "operators": ("operators", "system:masters"),
    **{node.name: (f"system:node:{node.name}", "system:nodes") for node in NODES},
}
"""Kubeconfig -> (user, group). The operators' own Roles are not what is tested here."""


@dataclass(frozen=True)
class Authority:
    certificate: x509.Certificate
    key: Key


def authority(folder: Path, common_name: str, *, organization: str | None = None, names: tuple[str, ...] = (),
              rsa_key: bool = False) -> Authority:  # fmt: skip
    """A certificate authority, written as ca.crt and ca.key."""
    key = _key(rsa_key)
    subject = _name(common_name, organization)
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    builder = _builder(subject, subject, key).add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    builder = builder.add_extension(usage, True)
    if names:
        builder = builder.add_extension(_alternative(names), False)
    certificate = builder.sign(key, hashes.SHA256())
    _write(folder, "ca", certificate, key)
    return Authority(certificate, key)


def issue(folder: Path, file: str, common_name: str, by: Authority, *, organization: str | None = None,
          names: tuple[str, ...] = (), rsa_key: bool = False) -> None:  # fmt: skip
    """A certificate for servers and clients, written as FILE.crt and FILE.key."""
    key = _key(rsa_key)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _builder(_name(common_name, organization), by.certificate.subject, key)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(x509.KeyUsage(True, False, True, False, False, False, False, False, False), True)
    builder = builder.add_extension(usage, False)
    if names:
        builder = builder.add_extension(_alternative(names), False)
    _write(folder, file, builder.sign(by.key, hashes.SHA256()), key)


def make_all() -> None:
    """What the control plane and the kubelets need, and one kubeconfig a user."""
    ca = authority(PKI, "qwenvl-test-cluster-ca")
    kubernetes = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
    issue(PKI, "apiserver", "kube-apiserver", ca, names=(*kubernetes, "127.0.0.1", GATEWAY, API_SERVICE))
    issue(PKI, "kubelet-client", "kube-apiserver-kubelet-client", ca, organization="system:masters")
    nodes = tuple(node.name for node in NODES)
    issue(PKI, "kubelet", "kubelet", ca, organization="system:nodes", names=(*nodes, GATEWAY, "127.0.0.1"))
    accounts = rsa.generate_private_key(65537, 2048)
    _write_key(PKI / "sa.key", accounts)
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    (PKI / "sa.pub").write_bytes(accounts.public_key().public_bytes(serialization.Encoding.PEM, public))
    rows = []
    for name, (user, group) in USERS.items():
        token = secrets.token_hex(16)
        rows.append(f'{token},{user},{name},"{group}"')
        kubeconfig(KUBECONFIG if name == "admin" else RUN / f"{name}.kubeconfig", token)
    (PKI / "tokens.csv").write_text("\n".join(rows) + "\n")


def kubeconfig(path: Path, token: str) -> Path:
    """A kubeconfig for the test cluster with a bearer token."""
    path.touch(mode=0o600)
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": API, "certificate-authority": str(PKI / "ca.crt")}}],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user"}}],
    }
    path.write_text(json.dumps(content))
    return path


# ---------------------------------------------------------------- parts


def _key(rsa_key: bool) -> Key:
    return rsa.generate_private_key(65537, 2048) if rsa_key else ec.generate_private_key(ec.SECP256R1())


def _name(common_name: str, organization: str | None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)] if organization else []
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(subject: x509.Name, issuer: x509.Name, key: Key) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - datetime.timedelta(minutes=5)).not_valid_after(now + VALID)


def _alternative(names: tuple[str, ...]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([_general(name) for name in names])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(folder: Path, file: str, certificate: x509.Certificate, key: Key) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{file}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    _write_key(folder / f"{file}.key", key)


def _write_key(path: Path, key: Key) -> None:
    # PKCS#1 for RSA: the operators' certificate rotator reads no other, and would replace the certificates in silence.
    form = serialization.PrivateFormat.TraditionalOpenSSL
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
