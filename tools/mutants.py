"""Mutation testing of one module: change its code in every small way that mutmut knows, and see that a test fails.

    python tools/mutants.py compile/policy    # what `make mutants ARGS=compile/policy` runs; without a module, all
    python tools/mutants.py --list

mutmut works in a copy of the sources under build/mutants, with the tests of the module alone. Exits with 1 where fewer
than 95 % of the mutants are killed; docs/mutants.md says of each survivor why it lives.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "mutants"
LEAST = 0.95
WITHOUT_INDUCTOR = (
    "test_the_arithmetic_of_the_opaque_operation",
    "test_any_number_of_rows_is_one_graph",
    "test_scales_by_column_of_any_number_of_rows_before_torch_2_13",
    "test_what_nobody_reads_is_not_made",
    "test_what_aten_operations_do_not_make_is_refused",
    "test_nan_and_inf_as_in_the_opaque_operation",
    "test_each_quantization_of_one_norm_keeps_its_layout",
)
NORMS_READ = (  # no run of the whole pass: seconds for each mutant
    "test_the_parts_of_a_norm",
    "test_the_parts_of_a_norm_of_a_sum",
    "test_a_sum_that_is_squared_and_written_down_again",
    "test_the_reason_why_a_product_is_not_read_as_a_norm",
    "test_other_arithmetic_is_no_norm",
    "test_rows_of_a_length_that_varies_are_refused",
    "test_a_factor_is_a_weight_and_what_is_added_to_it",
    "test_other_arithmetic_is_the_weight",
    "test_a_weight_of_one_value_per_column",
    "test_what_is_no_weight_is_refused_by_its_shape_or_dtype",
    "test_what_a_norm_reads",
    "test_a_norm_reads_a_copy_whose_rows_are_contiguous_where_those_of_its_source_are_not",
    "test_an_unrounded_sum_that_a_norm_reads",
    "test_sums_that_the_kernels_do_not_make",
    "test_other_inputs_that_the_kernels_do_not_read",
    "test_a_rounded_sum_that_the_kernels_do_not_make_stays_outside",
    "test_a_rounding_to_another_dtype_is_named",
)
SITES_FOUND = (
    "test_nothing_moves_across_an_operation_that_changes_a_tensor",
    "test_operations_that_quantize_inside_are_of_somebody_else_and_make_fp8_of_other_values",
    "test_anchors_are_quantizations_and_casts_to_fp8",
    "test_a_quantization_that_is_not_read_is_a_site_where_a_norm_is_near",
    "test_a_norm_is_near_where_a_root_is",
    "test_a_norm_whose_quantization_cannot_be_is_named",
    "test_of_what_changes_in_place_anchor_and_norm_are_named",
    "test_a_change_anywhere_between_what_the_op_reads_and_the_quantization_keeps_the_site",
    "test_the_arithmetic_of_a_site_has_the_norms_rounding_and_sum",
    "test_packed_scales_keep_a_site_of_their_own",
    "test_quantizations_of_one_arithmetic_are_one_match_in_the_layout_that_demands_most",
    "test_scales_in_aten_operations_have_the_layout_of_their_readers",
    "test_a_norm_that_is_written_down_again_is_one_match",
    "test_a_norm_that_is_changed_after_its_quantization_is_a_match",
    "test_quantizations_before_and_after_a_change_are_matches_of_their_own",
    "test_of_a_norm_and_its_copy_the_one_whose_inside_nobody_reads_is_a_match",
    "test_norms_whose_inside_is_one_are_matches_together_or_not_at_all",
    "test_the_reason_why_there_is_no_norm_in_front_is_that_of_each_quantization",
    "test_a_norm_is_near_among_the_last_operations",
    "test_a_norm_is_near_however_far_the_other_operands_come",
)
QUANTS_READ = (
    "test_the_parts_of_a_quantization",
    "test_an_amax_of_the_same_value_computed_again",
    "test_the_reason_why_a_quantization_is_refused",
    "test_rows_of_another_length_are_refused",
    "test_what_a_spec_refuses_is_refused_in_its_words",
    "test_a_group_of_a_length_that_varies_is_refused",
    "test_data_that_no_scale_divides_is_no_quantization",
    "test_axes_are_cut_where_a_shape_has_a_border",
    "test_rows_whose_number_varies_may_be_more_than_one",
)
# module -> the tests that have to notice a change of it
TESTS: dict[str, tuple[str, ...]] = {
    "compile/policy": ("compile/test_policy.py",),
    "compile/measured": ("compile/test_measured.py",),
    "compile/edit/build": ("compile/edit/test_build.py",),
    "compile/edit/cleanup": ("compile/edit/test_cleanup.py",),
    "compile/edit/decompose": tuple(f"compile/edit/test_decompose.py::{test}" for test in WITHOUT_INDUCTOR),
    "compile/find/axes": ("compile/find/test_axes.py",),
    "compile/find/duplicates": ("compile/find/test_duplicates.py",),
    "compile/find/norms": tuple(f"compile/find/test_norms.py::{test}" for test in NORMS_READ),
    "compile/find/quants": tuple(f"compile/find/test_quants.py::{test}" for test in QUANTS_READ),
    "compile/find/scale_arithmetic": ("compile/find/test_scale_arithmetic.py",),
    "compile/find/sites": tuple(f"compile/find/test_sites.py::{test}" for test in SITES_FOUND),
    "ops/_tensors": ("ops/test__tensors.py",),
    "ops/_op": ("ops/test__op.py", "ops/test_ops.py"),
    "spec": ("test_spec.py",),
}
# Without tests that compile: mutmut's switch between the mutants of a function is nothing that Dynamo can trace.
SETTINGS = """[mutmut]
source_paths=src
only_mutate=src/normquant/{module}.py
pytest_add_cli_args=
    -p
    no:cacheprovider
    -k
    not compiled
pytest_add_cli_args_test_selection=
    {tests}
"""
SURVIVED = ("survived", "no tests", "suspicious")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="module", help="below src/normquant, without .py; all by default")
    parser.add_argument("--list", action="store_true", help="name the modules that have tests here")
    args = parser.parse_args(argv)
    if args.list:
        print(*TESTS, sep="\n")
        return 0
    unknown = [module for module in args.modules if module not in TESTS]
    if unknown:
        parser.error(f"no tests are named for {', '.join(unknown)}; there are: {', '.join(TESTS)}")
    shares = [killed_share(module) for module in args.modules or TESTS]
    return int(min(shares) < LEAST)


def killed_share(module: str) -> float:
    """Run the mutants of a module, print those that live, and give the share that is killed."""
    _lay_out(module)
    _mutmut("run", "--max-children", str(os.cpu_count() or 1), check=True)
    states = dict(re.findall(r"^\s+(\S+): (.+)$", _mutmut("results", "--all", "true", capture=True), re.M))
    counts = Counter(states.values())
    alive = sorted(name for name, state in states.items() if state in SURVIVED)
    for name in alive:
        print(f"\n{name}: {states[name]}\n{_mutmut('show', name, capture=True)}")
    if not states:
        raise SystemExit(f"{module} has no code that mutmut changes; was it moved?")
    share = 1 - len(alive) / len(states)
    print(f"{module}: {len(states)} mutants, {share:.1%} killed ({dict(counts)})", flush=True)
    return share


def _lay_out(module: str) -> None:
    """A fresh copy of what mutmut changes and runs."""
    shutil.rmtree(WORK, ignore_errors=True)
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, WORK / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", WORK)
    tests = "\n    ".join(f"tests/{test}" for test in TESTS[module])
    (WORK / "setup.cfg").write_text(SETTINGS.format(module=module, tests=tests))


def _mutmut(*argv: str, capture: bool = False, check: bool = False) -> str:
    # One thread: a pool that was started before a fork hangs after it. The path goes: mutmut's copy has to be imported.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", "from mutmut.__main__ import cli; cli()", *argv]
    done = subprocess.run(command, cwd=WORK, env=environment, text=True, check=check, capture_output=capture)
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
