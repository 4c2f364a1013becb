"""What all plots share."""

from __future__ import annotations

from normquant.report import plot_style


def record(**more: str) -> dict[str, str]:
    return {"gpu": "NVIDIA H100", "torch": "2.11.0+cu130", "triton": "3.6.0", **more}


def test_the_line_under_a_plot() -> None:
    assert plot_style.caption([record()], "") == "NVIDIA H100; torch 2.11.0, triton 3.6.0"
    assert plot_style.caption([record()], "2026-11-25").endswith("; measured 2026-11-25")
    both = [record(date="2026-12-01"), record(gpu="NVIDIA H200")]
    assert plot_style.caption(both, "2026-11-25") == (
        "NVIDIA H100, NVIDIA H200; torch 2.11.0, triton 3.6.0; measured 2026-11-25 to 2026-12-01"
    )


def test_every_colour_has_one_for_dark_pages() -> None:
    rules = plot_style._dark_rules()
    for light, dark in plot_style.DARK.items():
        assert f'[style*="fill: {light.lower()}"] {{ fill: {dark} !important }}' in rules
        assert f'[style*="stroke: {light.lower()}"]' in rules
