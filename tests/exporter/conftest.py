"""Exporters of small models with random weights, each exported once per session."""

import pytest

from tests.backbones.conftest import make_var
from toprovar.exporter.graph import GraphExporter


@pytest.fixture(scope="session")
def exporter():
    """A VAR of five layers in fp32."""
    return GraphExporter(make_var())


@pytest.fixture(scope="session")
def half_exporter():
    """A VAR of three layers in fp16."""
    return GraphExporter(make_var(depth=3).half())
