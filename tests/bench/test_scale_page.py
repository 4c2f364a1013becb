"""docs/scale.md quotes the committed measurements of several ranks, and the cost model, as they are."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
from shared import pages
from shared.pages import row, table, words
from shared.rank_records import ALL, MEASURED_ONE_SHOT, RECORDS, ROOM

from normquant.bench.record_files import read
from normquant.distributed.algorithms import ONE_SHOT, TWO_SHOT, one_shot_rows
from normquant.distributed.cost import H200, GroupCall
from normquant.distributed.group_facts import GroupFacts

ROOT = Path(__file__).parents[2]
VLLM = [r for r in read(ROOT / "baselines" / "h200-vllm-0.26.jsonl") if r["tensor_parallel"] == 4]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
section = partial(pages.section, PAGE)
TARGETS = {  # of issue 17, by ranks and rows
    2: {1: 3.0, 4: 3.1, 16: 3.6, 32: 4.2, 64: 5.5, 128: 8.5, 256: 14, 512: 24, 2048: 80},
    4: {1: 3.2, 4: 3.5, 16: 4.8, 32: 6.5, 64: 9, 128: 14, 256: 22, 512: 35, 2048: 110},
    8: {},
}
ALGORITHMS = (("one shot", ONE_SHOT, False), ("two shots", TWO_SHOT, False), ("two shots, sharded", TWO_SHOT, True))


def by_rows(ranks: int) -> dict[int, dict[str, float]]:
    """Rows -> provider -> us."""
    found: dict[int, dict[str, float]] = {}
    for r in RECORDS:
        if r["ranks"] == ranks:
            found.setdefault(r["m"], {})[r["provider"]] = r["us"]
    return found


def test_auto_goes_up_to_where_nccl_was_slower() -> None:
    for ranks in (2, 4, 8):
        slower = [m for m, us in by_rows(ranks).items() if us["normquant"] >= us["NCCL + normquant"]]
        most = max(m for m in by_rows(ranks) if m < min(slower, default=10**9))
        facts = GroupFacts("0", ranks, (9, 0))
        assert facts.unmeasured(7168, most) is None and facts.unmeasured(7168, most + 1) is not None
        assert (facts.unmeasured(7168, None) is None) == (not slower)


def measured_rows(ranks: int) -> list[str]:
    """The rows of a table of measurements."""
    lines = []
    for m, us in by_rows(ranks).items():
        peers = {name: time for name, time in us.items() if not name.startswith("normquant")}
        best = min(peers, key=peers.__getitem__)
        times = (us["normquant"], us["normquant sharded"], peers[best])
        lines.append(
            row(m, *(f"{t:.2f}" for t in times), best.removesuffix(" + normquant"), TARGETS[ranks].get(m, "-"))
        )
    return lines


def rows_in_pieces() -> list[str]:
    """The rows of the table of more rows than the workspace has room for."""
    lines = []
    for m in sorted({r["m"] for r in ALL if r["m"] > ROOM}):
        us = {r["provider"]: r["us"] for r in ALL if r["m"] == m}
        best = min((name for name in us if not name.startswith("normquant")), key=us.__getitem__)
        times = us["normquant"], us["normquant collectives"], us[best]
        lines.append(row(m, *(f"{t:.2f}" for t in times), best.removesuffix(" + normquant")))
    return lines


def vllm_rows(moe: bool) -> list[str]:
    """The rows of a table of vLLM on 4 GPUs."""
    of = {(r["batch"], r["setting"]): r for r in VLLM if r["moe"] is moe}
    lines = []
    for batch in sorted({batch for batch, _ in of}):
        both = [of[batch, setting] for setting in ("installed", "installed-normquant")]
        without, ours = (r["replay_us"] for r in both)
        wall = " / ".join(f"{r['tpot_ms']:.2f}" for r in both)
        lines.append(
            row(f"batch {batch}", f"{without:.1f}", f"{ours:.1f}", f"{100 * (ours / without - 1):+.1f} %", wall)
        )
    for tokens in ("2048", "8192"):
        both = (of[1, setting]["prefill_ms"] for setting in ("installed", "installed-normquant"))
        wall = " / ".join(f"{ms[tokens]:.2f}" for ms in both)
        lines.append(f"| prompt of {tokens} | | | | {wall} |")
    return lines


def predicted_rows() -> list[str]:
    """The rows of the table of predictions for 8 ranks."""
    lines = []
    for m, us in by_rows(8).items():
        algorithm = ONE_SHOT if m <= MEASURED_ONE_SHOT[8] else TWO_SHOT
        cells = []
        for name, sharded in (("normquant", False), ("normquant sharded", True)):
            predicted = H200.us(GroupCall(8, m, algorithm, sharded))
            cells += [f"{predicted:.2f}", f"{us[name]:.2f}", f"{100 * (predicted / us[name] - 1):+.0f} %"]
        lines.append(row(m, *cells))
    return lines


def cost_rows() -> list[str]:
    """The rows of the table of bytes and predicted times."""
    lines = []
    for label, algorithm, sharded in ALGORITHMS:
        calls = {n: GroupCall(n, 1, algorithm, sharded) for n in (2, 4, 8, 16)}
        sent = (f"{call.row_bytes / 1e3:.1f}" for call in calls.values())
        lines.append(row(label, calls[2].hops, *sent))
    return lines


def tables() -> dict[str, list[str]]:
    """Section -> the rows of its table."""
    chosen = [row(n, one_shot_rows(n, False), one_shot_rows(n, True)) for n in (2, 4, 8)]
    measured = {f"{n} ranks": measured_rows(n) for n in (2, 4, 8)}
    measured["More rows than the workspace has room for"] = rows_in_pieces()
    return measured | {"Cost model": cost_rows(), "Eight ranks predicted": predicted_rows(), "The choice": chosen}


@pytest.mark.parametrize("title", tables())
def test_a_table_is_what_was_measured(title: str) -> None:
    _, *rows = table(section(title))
    assert rows == tables()[title]


def test_vllm_on_4_gpus_is_quoted() -> None:
    text = section("vLLM on 4 GPUs")
    dense, experts = text.split("Experts in 4 of the 16 layers:")
    assert table(dense)[1:] == vllm_rows(False) and table(experts)[1:] == vllm_rows(True)
    (command,) = re.findall(r"^normquant bench vllm .*", text, re.M)
    assert all(r["command"].startswith(command) for r in VLLM)
    versions = {(r["gpu"], r["vllm"], r["flashinfer"], r["torch"][:4], r["layers"], r["date"]) for r in VLLM}
    assert versions == {("NVIDIA H200", "0.26.0", "0.6.14", "2.11", 16, "2026-11-27")}
    for name, value in VLLM[0]["switches"].items():
        assert f"{name}={value}" in text


def test_every_table_of_the_page_is_one_of_these() -> None:
    vllm = sum(1 + len(vllm_rows(moe)) for moe in (False, True))
    assert len(table(PAGE)) == sum(1 + len(rows) for rows in tables().values()) + vllm


def test_the_constants_of_the_model_are_quoted() -> None:
    for text in (f"{H200.launch_us:.2f} us", f"{H200.peer_us} us", f"{H200.hop_us} us", f"{H200.gb_per_s} GB/s"):
        assert text in words(section("Cost model"))


def test_the_commands_are_those_of_the_records() -> None:
    commands = {r["command"].removesuffix(" --quiet").replace("'", "") for r in ALL}
    assert commands == {text.replace("'", "") for text in re.findall(r"^normquant bench kernels .*", PAGE, re.M)}
    assert {(r["gpu"], r["torch"], r["triton"]) for r in RECORDS} == {("NVIDIA H200", "2.11.0+cu130", "3.6.0")}
    assert "H200" in PAGE and "torch 2.11.0" in PAGE and "Triton 3.6.0" in PAGE


def test_what_the_page_says_of_bits_holds() -> None:
    assert {r["match"] for r in RECORDS if r["provider"].startswith("normquant")} == {"bitwise"}
    others = {r["match"] == "bitwise" for r in RECORDS if r["ranks"] > 2 and not r["provider"].startswith("normquant")}
    assert others == {False}
    slower = [
        (r, m)
        for r in (2, 4, 8)
        for m, us in by_rows(r).items()
        if min(us.values()) < min(us["normquant"], us["normquant sharded"])
    ]
    assert slower == []
    whole = [
        (r, m)
        for r in (2, 4, 8)
        for m, us in by_rows(r).items()
        if min(t for n, t in us.items() if not n.startswith("normquant")) < us["normquant"]
    ]
    assert whole == [(8, 256), (8, 2048)]
