"""What a user of vLLM switches: the environment variables NORMQUANT and NORMQUANT_CHECK, and
`additional_config={"normquant": {...}}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from normquant.compile.policy import Rules

VARIABLE = "NORMQUANT"
ALL_REDUCE_VARIABLE, CHECK_VARIABLE = "NORMQUANT_ALL_REDUCE", "NORMQUANT_CHECK"
KEY = "normquant"
ENABLED, POLICY, SITES, TABLE, STRICT = "enabled", "policy", "sites", "table", "strict"
PRODUCTS, ALL_REDUCE, CHECK = "products", "all_reduce", "check"
TYPES = {
    ENABLED: bool,
    POLICY: str,
    SITES: dict,
    TABLE: str,
    PRODUCTS: str,
    STRICT: bool,
    ALL_REDUCE: bool,
    CHECK: bool,
}


@dataclass(frozen=True)
class Switches:
    """enabled: whether normquant does anything. rules, strict, all_reduce: as `normquant.inductor_options` takes them.

    check: whether every quantized form that is handed from one module to another is compared with a fresh one.
    """

    enabled: bool = False
    rules: Rules = field(default_factory=Rules)
    strict: bool = False
    all_reduce: bool = False
    check: bool = False


def read_switches(environ: Mapping[str, str], additional_config: object) -> Switches:
    """What the environment and vLLM's `additional_config` ask for; without either, nothing.

    NORMQUANT=1 switches on and NORMQUANT=0 off, whatever `additional_config` says; NORMQUANT_ALL_REDUCE does the same
    for "all_reduce". The entry "normquant" of `additional_config` switches on, and may hold:
        "enabled": false to switch off.
        "policy", "sites", "table", "products", "strict", "all_reduce": as `normquant.inductor_options` takes them.
        "check": true to compare what is handed over, as NORMQUANT_CHECK=1 does.
    An `additional_config` that is no dict says nothing about normquant.

    Raises ValueError for anything else, OSError for a table that cannot be read.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    entry = _checked(given) if given is not None else {}
    enabled = _switched(environ, VARIABLE, entry.get(ENABLED, True) if given is not None else False)
    all_reduce = _switched(environ, ALL_REDUCE_VARIABLE, entry.get(ALL_REDUCE, False))
    check = _switched(environ, CHECK_VARIABLE, entry.get(CHECK, False))
    if not enabled:
        return Switches()
    rules = Rules(entry.get(POLICY, "auto"), dict(entry.get(SITES, {})), entry.get(TABLE), entry.get(PRODUCTS, "auto"))
    return Switches(True, rules, entry.get(STRICT, False), all_reduce, check)


def _switched(environ: Mapping[str, str], variable: str, otherwise: bool) -> bool:
    given = environ.get(variable, "")
    if given not in ("", "0", "1"):
        raise ValueError(f"{variable} is {given!r}; accepted: 1 (on), 0 (off)")
    return given == "1" if given else otherwise


def _checked(entry: object) -> Mapping[str, Any]:
    where = f"additional_config[{KEY!r}]"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {entry!r}; a dict with {', '.join(map(repr, TYPES))} is accepted")
    for name, value in entry.items():
        if name not in TYPES:
            raise ValueError(f"{where} has {name!r}; accepted: {', '.join(map(repr, TYPES))}")
        if not isinstance(value, TYPES[name]):
            raise ValueError(f"{where}[{name!r}] is {value!r}; a {TYPES[name].__name__} is accepted")
    return entry
