"""What switches the vLLM plugin on and off, and what it says to input that it does not understand."""

from __future__ import annotations

from pathlib import Path

import pytest

from normquant.vllm.plugin import why_unsupported
from normquant.vllm.switches import Switches, read_switches


@pytest.mark.parametrize(
    ("variable", "entry", "enabled"),
    [
        (None, None, False),
        ("", None, False),
        ("1", None, True),
        ("0", None, False),
        (None, {}, True),
        (None, {"enabled": False}, False),
        ("1", {"enabled": False}, True),
        ("0", {"policy": "always"}, False),
    ],
)
def test_the_variable_goes_before_the_config(variable: str | None, entry: dict | None, enabled: bool) -> None:
    environ = {} if variable is None else {"NORMQUANT": variable}
    config = {"other_plugin": 1} | ({} if entry is None else {"normquant": entry})
    assert read_switches(environ, config).enabled is enabled


def test_the_entry_is_read() -> None:
    entry = {"policy": "always", "sites": {"layers.0.*": "never"}, "strict": True, "products": "never"}
    switches = read_switches({}, {"normquant": entry})
    assert (switches.rules.policy, switches.strict) == ("always", True)
    assert switches.rules.sites == {"layers.0.*": "never"} and switches.rules.products == "never"
    assert read_switches({"NORMQUANT": "1"}, None).rules.products == "auto"


@pytest.mark.parametrize(
    ("variable", "entry", "check"),
    [("", {}, False), ("1", {}, True), ("", {"check": True}, True), ("0", {"check": True}, False)],
)
def test_the_check_is_asked_for_by_variable_or_entry(variable: str, entry: dict, check: bool) -> None:
    environ = {"NORMQUANT_CHECK": variable, "NORMQUANT": "1"}
    assert read_switches(environ, {"normquant": entry}).check is check


@pytest.mark.parametrize(
    ("variable", "entry", "fused"),
    [("", {}, False), ("1", {}, True), ("", {"all_reduce": True}, True), ("0", {"all_reduce": True}, False)],
)
def test_all_reduces_are_fused_where_that_is_asked_for(variable: str, entry: dict, fused: bool) -> None:
    environ = {"NORMQUANT": "1", "NORMQUANT_ALL_REDUCE": variable}
    assert read_switches(environ, {"normquant": entry}).all_reduce is fused
    with pytest.raises(ValueError, match="NORMQUANT_ALL_REDUCE is 'yes'"):
        read_switches({"NORMQUANT": "1", "NORMQUANT_ALL_REDUCE": "yes"}, None)


def test_a_table_that_is_missing_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing\.json"):
        read_switches({}, {"normquant": {"table": str(tmp_path / "missing.json")}})


@pytest.mark.parametrize("config", [None, {}, object(), [("normquant", {})]])
def test_other_configs_say_nothing(config: object) -> None:
    assert read_switches({}, config) == Switches()


@pytest.mark.parametrize(
    ("environ", "entry", "words"),
    [
        ({"NORMQUANT": "yes"}, None, "NORMQUANT is 'yes'; accepted: 1 (on), 0 (off)"),
        ({"NORMQUANT_CHECK": "2"}, None, "NORMQUANT_CHECK is '2'; accepted: 1 (on), 0 (off)"),
        ({}, True, "is True; a dict with"),
        ({}, {"polcy": "auto"}, "has 'polcy'; accepted: 'enabled', 'policy'"),
        ({}, {"policy": 3}, "['policy'] is 3; a str is accepted"),
        ({}, {"policy": "sometimes"}, "policy is 'sometimes'; accepted: 'auto'"),
        ({}, {"products": "often"}, "products is 'often'; accepted: 'auto'"),
        ({"NORMQUANT": "0"}, {"strict": "no"}, "['strict'] is 'no'; a bool is accepted"),
    ],
)
def test_what_is_not_understood_is_said(environ: dict, entry: object, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_switches(environ, {} if entry is None else {"normquant": entry})
    assert words in str(caught.value)


@pytest.mark.parametrize("version", ["0.26.0", "0.26.0+cu130", "0.30.1", "0.33.1rc2.dev7+g0123456"])
def test_versions_in_the_window(version: str) -> None:
    assert why_unsupported(version) is None


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0", "1.0.0", "0.3.0", "dev", ""])
def test_versions_outside_of_the_window(version: str) -> None:
    reason = why_unsupported(version)
    assert reason is not None and "0.26 to 0.33 are supported" in reason and version in reason
