"""A decoder layer of vLLM 0.26.0 on an H100, as its compile cache held it: with its norm-quant fusion, and without."""

from __future__ import annotations

import pytest
from shared.generated_code import OFF, ON

from normquant.audit import AuditReport, audit_path


@pytest.fixture(scope="session")
def on() -> AuditReport:
    return audit_path(ON, rows=(64,))[0]


@pytest.fixture(scope="session")
def off() -> AuditReport:
    return audit_path(OFF, rows=(64,))[0]
