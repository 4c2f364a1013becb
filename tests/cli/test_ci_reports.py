"""What `normquant audit` and `normquant compare` write for CI servers."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from shared.generated_code import OFF, ON

from normquant.cli import audit
from normquant.cli.entry import main

ROOT = Path(__file__).parents[2]
LAYER = str(ON)
GATE = ("--m", "64", "--fail-on", "identity,dropped-ue8m0", "--expect", "rms_norm_per_block_quant=3")


def junit_tests(path: Path) -> dict[str, list[str]]:
    """Name of each test in a JUnit file -> its failures."""
    cases = ElementTree.parse(path).iter("testcase")
    return {case.get("name", ""): [failure.text or "" for failure in case] for case in cases}


def test_checks_of_an_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sarif, junit = tmp_path / "a.sarif", tmp_path / "a.xml"
    assert main(["audit", LAYER, *GATE, "--sarif", str(sarif), "--junit", str(junit)]) == 1
    tests = junit_tests(junit)
    assert list(tests) == ["something is launched", "no identity", "no dropped-ue8m0", "3 of rms_norm_per_block_quant"]
    (failure,) = tests.pop("no dropped-ue8m0")
    assert not any(tests.values())
    err = capsys.readouterr().err
    assert [f"failed: {line}" for line in failure.splitlines()] == err.splitlines()
    (run,) = json.loads(sarif.read_text())["runs"]
    assert {"mutated-input-copy", "dropped-ue8m0"} <= {result["ruleId"] for result in run["results"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([LAYER, "--junit", "a.xml"], "--junit writes what is checked"),
        (["--diff", LAYER, str(OFF), "--sarif", "a.sarif"], "--sarif is not read with --diff"),
        ([LAYER, *GATE, "--junit", "no/such/a.xml"], "no/such is not a directory"),
        ([LAYER, *GATE, "--sarif", "-"], "- is no path of a file; /dev/stdout is one"),
    ],
)
def test_options_that_make_no_sense(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["audit", *words]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def record(m: int, us: float) -> str:
    case = {"suite": "kernels", "op": "group_quant", "m": m, "k": 128, "provider": "normquant", "gpu": "H100"}
    return json.dumps(case | {"us": us, "us_p10": us, "us_p90": us}) + "\n"


def test_a_regression_is_a_failed_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, junit = (str(tmp_path / name) for name in ("before.jsonl", "after.jsonl", "c.xml"))
    Path(before).write_text(record(1, 1.0) + record(2, 1.0) + record(4, 1.0))
    Path(after).write_text(record(1, 1.2) + record(2, 1.0))
    assert main(["compare", before, after, "--junit", junit]) == 2
    assert "--junit writes what is checked: give --fail-if-slower as well" in capsys.readouterr().err
    assert main(["compare", before, after, "--junit", junit, "--fail-if-slower", "5%"]) == 1
    tests = junit_tests(Path(junit))
    assert tests == {
        "normquant group_quant m=1 k=128": ["1.00 -> 1.20 us, 20.0% slower; at most 5.0% is accepted"],
        "normquant group_quant m=2 k=128": [],
    }


def shell_lines(node: Any) -> list[str]:
    """What the steps of a workflow run, however deep they are."""
    if isinstance(node, dict):
        own = [node["run"]] if isinstance(node.get("run"), str) else []
        return own + list(node.get("script", [])) + [line for one in node.values() for line in shell_lines(one)]
    return [line for one in node for line in shell_lines(one)] if isinstance(node, list) else []


def test_the_workflows_in_the_docs_are_yaml_whose_commands_parse() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "ci.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in shell_lines(yaml.safe_load(block))]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("normquant ")]
    assert len(blocks) == 3 and len(commands) == 2
    for words in commands:
        known = {"$MODEL": "m:build", "$TARGET": "h100", "$FAIL_ON": "identity"}
        parser = argparse.ArgumentParser()
        audit.add_arguments(parser)
        args = parser.parse_args([known.get(word, word) for word in words[1:]])
        assert words[0] == "audit" and args.fail_on and (args.sarif or args.junit)
