"""All rules, and the check of programs against them.

A rule is a function from a program's data flow to drafts of findings, with an id, a severity and a page,
docs/rules/<id>.md. The ids are stable: they are what `--fail-on` takes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from normquant.audit.program import Program
from normquant.audit.result import ERROR, NOTE, WARNING, Draft, Finding
from normquant.audit.rules import needless_copies, scales, traffic
from normquant.audit.rules.data_flow import Flow
from normquant.audit.targets import Target


@dataclass(frozen=True)
class Rule:
    """A check. `find` takes a program's data flow, and all the programs that are audited together."""

    id: str
    severity: str
    find: Callable[[Flow, Sequence[Program]], Iterator[Draft]]


RULES: tuple[Rule, ...] = (
    Rule("identity", ERROR, needless_copies.identity),
    Rule("cast-round-trip", ERROR, needless_copies.cast_round_trip),
    Rule("layout-copy", ERROR, needless_copies.layout_copy),
    Rule("mutated-input-copy", ERROR, needless_copies.mutated_input_copy),
    Rule("dropped-ue8m0", ERROR, scales.dropped_ue8m0),
    Rule("misaligned-scales", WARNING, scales.misaligned_scales),
    Rule("opaque-boundary", WARNING, traffic.opaque_boundary),
    Rule("fp32-spill", WARNING, traffic.fp32_spill),
    Rule("unfused-neighbours", WARNING, traffic.unfused_neighbours),
    Rule("reread", NOTE, traffic.reread),
)
RULE_IDS: tuple[str, ...] = tuple(rule.id for rule in RULES)


def check(programs: Sequence[Program], target: Target) -> tuple[Finding, ...]:
    """The findings of all rules in programs that belong together, in launch order."""
    found: list[Finding] = []
    for number, program in enumerate(programs):
        flow = Flow(program)
        here = [_finding(rule, draft, program, number, target) for rule in RULES for draft in rule.find(flow, programs)]
        found.extend(sorted(here, key=lambda finding: (finding.position, finding.rule)))
    return tuple(found)


def _finding(rule: Rule, draft: Draft, program: Program, number: int, target: Target) -> Finding:
    launch = draft.launch
    return Finding(
        rule=rule.id,
        severity=rule.severity,
        kernel=launch.name,
        position=launch.position,
        bytes=draft.bytes,
        est_us=draft.bytes / (target.dram_gbps * 1e3) + draft.launches * target.launch_us,
        share=draft.bytes / program.bytes if program.bytes else 0.0,
        message=draft.message,
        fix=draft.fix,
        buffer=draft.buffer,
        file=launch.file,
        line=launch.line,
        origins=launch.origins,
        program=number,
    )
