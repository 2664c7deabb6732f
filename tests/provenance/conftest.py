"""Signing key of the tests of provenance."""

import pytest

from vidgen_ray.provenance.signing import create_signing_key


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "c2pa.pem"
    create_signing_key(path, "Test Studio")
    return path
