"""Whole audits of code on disk: sizes, several programs, large ones, the report as data; and the package's names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from shared.clean_graphs import GRAPHS, compiled
from shared.generated_code import COPY, KERNEL, ON, SEEDS, module

from normquant.audit import AuditReport, audit_path, reports, rules
from normquant.audit.program import GeneratedCode
from normquant.audit.result import SCHEMA_VERSION

M, K = 64, 7168


def test_an_unknown_size_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="no size called s1 in the code; its symbolic sizes are s72"):
        audit_path(ON, sizes={"s1": 4})
    with pytest.raises(ValueError, match="it has no symbolic sizes"):
        audit_path(SEEDS / "conv.py", sizes={"s1": 4})


def test_sizes_may_be_given_by_name() -> None:
    assert audit_path(ON, sizes={"s72": 5})[0].programs[0].sizes == {"s72": 5}


def test_sizes_are_evaluated_at_the_rows_asked_for() -> None:
    small, large = audit_path(ON, rows=(1, 8192))
    assert small.programs[0].sizes == {"s72": 1} and large.programs[0].sizes == {"s72": 8192}
    copies = [next(k for k in r.kernels if k.name == "triton_poi_fused_0") for r in (small, large)]
    assert [k.bytes for k in copies] == [2 * K * 2, 2 * 8192 * K * 2]


def test_a_kernel_of_two_counts_what_each_half_reads(off: AuditReport) -> None:
    (both,) = [k for k in off.kernels if k.name == "triton_red_fused_3"]  # the two norms of the fused projection
    assert (both.bytes_read, both.bytes_written) == (M * 2048 * 2 + (1536 + 512) * 2, M * 2048 * 2)


def test_several_programs_are_one_report() -> None:
    (report,) = audit_path(SEEDS)
    assert len(report.programs) == len(list(SEEDS.glob("*.py")))
    assert report.bytes == sum(p.bytes for p in report.programs)


def test_code_on_disk_gives_the_report_of_its_compile(tmp_path: Path) -> None:
    """Less what only the compiler knows: origins in the user's code, and why kernels were not fused."""
    captured, live = compiled("add_norm_quant")
    path = tmp_path / "graph.py"
    path.write_text(captured.text)
    (read,) = audit_path(path)
    assert [(f.rule, f.kernel, f.bytes) for f in read.findings] == [(f.rule, f.kernel, f.bytes) for f in live.findings]
    assert [(n.name, n.reads, n.writes) for n in read.launches] == [(n.name, n.reads, n.writes) for n in live.launches]
    assert read.source == live.source and live.kernels[0].origins


def test_ten_megabytes_in_under_ten_seconds_and_a_gigabyte(tmp_path: Path) -> None:
    """As many layers as fill 10 MB, with every kernel's text its own, as a compile cache has them."""
    layer, total = ON.read_text(), 0
    for number in range(10_000):
        text = layer.replace("_fused_", f"_fused_layer{number}_")
        (tmp_path / f"layer{number}.py").write_text(text)
        total += len(text)
        if total >= 10_000_000:
            break
    began = time.process_time()
    (report,) = audit_path(tmp_path, rows=(64,))
    spent = time.process_time() - began
    assert len(report.programs) == number + 1 and spent < 10, f"{spent:.1f} s"


def test_one_file_of_ten_megabytes(tmp_path: Path) -> None:
    kernels, calls = [], []
    kernel = KERNEL.replace("BODY", "\n    ".join(COPY.splitlines()) + "\n    # " + "x" * 1400)
    for number in range(5_000):
        name = f"triton_poi_fused_{number}"
        text = kernel.replace("triton_poi_fused_0", name)
        kernels.append(f"{name} = async_compile.triton('{name}', '''{text}''', device_str='cuda')\n")
        calls.append(f"    {name}.run(arg0_1, buf0, 4096, stream=stream0)\n")
    head, tail = module(COPY).split("def call(args):")
    body = tail.replace("    triton_poi_fused_0.run(arg0_1, buf0, 4096, stream=stream0)\n", "".join(calls))
    path = tmp_path / "large.py"
    path.write_text(head + "".join(kernels) + "def call(args):" + body)
    assert path.stat().st_size > 10_000_000
    code = (
        "import json, sys, time\nfrom normquant.audit import audit_path\nbegan = time.process_time()\n"
        "(report,) = audit_path(sys.argv[1])\nspent = time.process_time() - began\n"
        # not ru_maxrss: a child's begins at what its parent, the test run, has used
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(json.dumps([len(report.kernels), spent, int(peak)]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    kernels_read, spent, peak_kib = json.loads(done.stdout)
    assert kernels_read == 5_000 and spent < 10 and peak_kib < 1 << 20, (spent, peak_kib)


def test_reports_are_plain_data() -> None:
    (report,) = audit_path(ON, rows=(64,))
    data = json.loads(report.to_json())
    assert set(data) >= {"kernels", "extern", "findings", "bytes", "wasted_bytes"}
    assert set(data["kernels"][0]) >= {"name", "kind", "file", "bytes_read", "bytes_written", "reads", "writes"}
    assert set(data["findings"][0]) >= {"rule", "kernel", "bytes", "est_us", "message", "fix"}
    assert {"name": "_C.rms_norm_per_block_quant", "count": 3} in data["extern"]
    assert reports.audit_code([GeneratedCode("x", ON.read_text())], "h100", (64,))[0].bytes == data["bytes"]


PACKAGE = Path(rules.__file__).parents[1]
SHARED = {"program", "result", "targets", "operators", "size_expressions"}  # and none of them imports a folder


@pytest.mark.parametrize("folder", ["capture", "source", "rules", ""])
def test_imports_inside_the_package_flow_one_way(folder: str) -> None:
    files = sorted((PACKAGE / folder).glob("*.py")) if folder else [PACKAGE / f"{name}.py" for name in SHARED]
    assert len(files) >= 5
    for file in files:
        text = file.read_text()
        imported = set(re.findall(r"from normquant\.audit\.(\w+)", text))
        for names in re.findall(r"from normquant\.audit import (.+)", text):
            imported |= set(names.split(", "))
        assert imported <= SHARED | {folder}, file


BLOCKED = "import sys; sys.modules['torch'] = None\n"  # the package itself, without normquant/__init__'s torch
LIGHT = "assert not {'triton', 'torch._inductor'} & sys.modules.keys(), sys.modules.keys()\n"
SPELLINGS = {
    "the package": "import normquant.audit\nfrom normquant.audit.rules import RULE_IDS\n"
    "assert callable(normquant.audit) and normquant.audit.rules.RULE_IDS is RULE_IDS\n"
    "assert normquant.audit.audit_path is normquant.audit.reports.audit_path\n",
    "the function": "from normquant.audit import audit\nimport normquant.audit as package\n"
    "assert audit.__name__ == 'audit' and package.audit is audit and package.audit_path\n",
    "the public name": "import inspect, normquant as nq\nfrom normquant import audit\n"
    "assert nq.audit is audit and callable(audit) and audit.audit_path and audit.rules.RULES\n"
    "assert inspect.signature(audit) == inspect.signature(audit.audit)\n"
    "assert audit.__call__.__doc__ == audit.audit.__doc__\n",
}


@pytest.mark.parametrize("second", SPELLINGS)
@pytest.mark.parametrize("first", SPELLINGS)
def test_every_spelling_works_after_every_other(first: str, second: str) -> None:
    """`nq.audit` is the package, and can be called: the function does not hide it, nor it the function."""
    code = SPELLINGS[first] + SPELLINGS[second]
    if "the public name" not in (first, second):  # which needs torch
        code = BLOCKED + code + LIGHT
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_audits_when_it_is_called() -> None:
    import normquant as nq

    report = nq.audit(*GRAPHS["add"], target="h200")
    assert isinstance(report, AuditReport) and report.target.name == "h200" and len(report.kernels) == 1
    with pytest.raises(ValueError, match="unknown target 'a100'"):
        nq.audit(*GRAPHS["add"], "a100")


def strict(schema: Any) -> Any:
    """A JSON schema with every object closed: a field that it does not describe is an error."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {name: strict(one) for name, one in schema.items()} | closed


def test_the_data_is_what_the_schema_in_the_package_says() -> None:
    schema = json.loads((resources.files("normquant.audit") / "audit.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    _, live = compiled("add_norm_quant")
    found = [report.to_dict() for report in (*audit_path(ON, rows=(1, 64)), live)]
    for data in (found, found[0]):
        jsonschema.validate(json.loads(json.dumps(data)), strict(schema))
    versions = schema["$defs"]["report"]["properties"]["schema_version"]
    assert versions == {"const": SCHEMA_VERSION}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found[0], "bytes": "many"}, schema)
