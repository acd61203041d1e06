"""A warm start reads no bundle of certificates before somebody trusts it, and then all of it."""

import datetime
import ipaddress
import json
import re
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import certifi
import pytest
from agents_support import ATTEMPT, both, visible, warmed, with_launcher
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lightning_ray.agents import Task

WHAT_IS_TRUSTED = """
import ssl, sys
import certifi

def told(work):
    try:
        return work()
    except Exception as error:
        return type(error).__name__, str(error)

def after(*told_to_trust, kind=ssl.PROTOCOL_TLS_CLIENT, named={}):
    context = ssl.SSLContext(kind)
    said = [told(lambda: context.load_verify_locations(*told_to_trust, **named))]
    return [*said, context.cert_store_stats(), sorted(map(str, context.get_ca_certs()))]

class Own(ssl.SSLContext):
    pass

bundle, broken, other = certifi.where(), sys.argv[1], sys.argv[2]
print(after(bundle))
print(after(named={"cafile": bundle}))
print(after(bundle.encode()))
print(after(bundle, None, open(other).read()))
print(after(bundle, kind=ssl.PROTOCOL_TLS_SERVER))
print(after(other), after(broken), after("missing"), after(None), after(3), after(bundle, bundle))
print(ssl.create_default_context(cafile=bundle).cert_store_stats())
own = Own(ssl.PROTOCOL_TLS_CLIENT)
own.load_verify_locations(bundle)
print(own.cert_store_stats())
twice = ssl.create_default_context(cafile=other)
twice.load_verify_locations(bundle)
print(twice.cert_store_stats(), twice.cert_store_stats(), len(twice.get_ca_certs(True)))
print(ssl.SSLContext.load_verify_locations.__doc__, ssl.SSLContext.get_ca_certs.__name__)
"""

BYTES_READ = """
import json, sys
import httpx

def read():
    return int(open("/proc/self/io").read().split()[1])

before = read()
client = httpx.Client()
made = read() - before
print(json.dumps([made, client._transport._pool._ssl_context.cert_store_stats()]))
"""

UNCAUGHT = """
import ssl, sys

def trust(path):
    return ssl.create_default_context(cafile=path)

try:
    trust("missing")
except OSError as error:
    raise RuntimeError("no authority") from error
"""

CONNECTIONS = """
import ssl, sys, threading, urllib.request
import certifi

def get(context):
    try:
        with urllib.request.urlopen(sys.argv[1], context=context, timeout=20) as reply:
            return reply.read().decode()
    except OSError as error:
        return getattr(error.reason, "reason", str(error))

print(get(ssl.create_default_context(cafile=certifi.where())))
print(get(ssl.create_default_context(cafile=ssl.get_default_verify_paths().cafile)))
shared, said = ssl.create_default_context(cafile=ssl.get_default_verify_paths().cafile), []
threads = [threading.Thread(target=lambda: said.append(get(shared))) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(said)
"""


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Path:
    """A certificate of 127.0.0.1 that signs itself, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    itself = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(itself, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file = tmp_path_factory.mktemp("authority") / "authority.pem"
    file.write_bytes(certificate.public_bytes(pem) + key.private_bytes(pem, *plain))
    return file


@pytest.fixture
def secure_server(authority) -> Iterator[str]:
    """The address of a server whose certificate only `authority` vouches for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "7")
            self.end_headers()
            self.wfile.write(b"trusted")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_what_a_context_trusts_is_the_same(agent, tmp_path, authority):
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nbroken\n-----END CERTIFICATE-----\n")
    config = agent(WHAT_IS_TRUSTED, str(broken), str(authority))
    ((cold, warm),) = both(config, [Task("1", {})])
    assert cold.exit_code == 0, cold.stderr
    assert visible(warm) == visible(cold)
    assert len(cold.stdout) > 100_000, "it should have said whom it trusts"


def test_a_client_that_speaks_to_nobody_reads_no_certificates(agent):
    ((cold, warm),) = both(agent(BYTES_READ), [Task("1", {})])
    size = Path(certifi.where()).stat().st_size
    (read, trusted), (read_warm, trusted_warm) = json.loads(cold.stdout), json.loads(warm.stdout)
    assert read > size / 2 > 0 and read_warm < size / 10
    assert trusted_warm == trusted and trusted["x509"] > 50


def test_a_bundle_that_changes_before_it_is_needed_is_trusted_as_it_was(agent, authority):
    source = """
import os, ssl, sys
what, bundle, other = sys.argv[1:]
before = ssl.create_default_context(cafile=bundle)
if what == "go":
    with open(bundle, "a") as file:
        file.write(open(other).read())
    after = ssl.create_default_context(cafile=bundle)
    os.unlink(bundle)
    print(before.cert_store_stats(), after.cert_store_stats())
"""
    words = ["{what}", "bundle.pem", str(authority)]
    config = agent(source, *words, env={"SSL_CERT_FILE": "bundle.pem"})
    bundle = Path(config.cwd) / "bundle.pem"

    async def run(launcher):
        return await launcher.run(Task("1", {"what": "go"}), ATTEMPT, 30)

    async def warm(launcher):
        await warmed(launcher, Task("1", {"what": "learn"}), ATTEMPT)
        return await run(launcher)

    bundle.write_bytes(Path(certifi.where()).read_bytes())
    expected = with_launcher(replace(config, warm_start=False), run)
    assert expected.exit_code == 0, expected.stderr
    bundle.write_bytes(Path(certifi.where()).read_bytes())
    result = with_launcher(config, warm)
    assert result.warm and visible(result) == visible(expected)
    counts = re.findall(r"'x509': (\d+)", result.stdout)
    assert int(counts[1]) == int(counts[0]) + 1


def test_a_traceback_shows_the_agents_frames_and_pythons(agent):
    ((cold, warm),) = both(agent(UNCAUGHT), [Task("1", {})])
    assert cold.exit_code == 1 and "RuntimeError: no authority" in cold.stderr
    assert visible(warm) == visible(cold)


def test_connections_are_trusted_and_refused_alike(agent, authority, secure_server):
    config = agent(CONNECTIONS, secure_server, env={"SSL_CERT_FILE": str(authority)})
    ((cold, warm),) = both(config, [Task("1", {})])
    assert visible(warm) == visible(cold)
    refused, trusted, of_threads = cold.stdout.splitlines()
    assert (refused, trusted) == ("CERTIFICATE_VERIFY_FAILED", "trusted")
    assert of_threads == str(["trusted"] * 8)
