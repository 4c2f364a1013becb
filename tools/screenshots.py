"""Pictures of the auditor's page, for the docs: one layer, before and after, dark, on a phone, and 32 layers.

    make screenshots        # docs/page-*.png; ten minutes the first time, since 32 layers are compiled twice

The audits are kept in build/screenshots/, and made only where they are not there. Needs Chromium and the dev extra.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "screenshots"
SIDES = ("torch.compile", "with normquant")
COLORS = 128  # of a picture's palette


@dataclass(frozen=True)
class Shot:
    """One picture: of which audits, in which window, and what is done in the page before it is taken."""

    name: str
    title: str
    audits: tuple[str, ...]
    width: int
    height: int
    scheme: str = "light"
    density: int = 1
    script: str = ""


TO_FLOW = "document.querySelector('.tools').scrollIntoView();"
CHOOSE = 'document.querySelector(".row.{}").click();'
R1, LLAMA = "DeepSeek-R1, one layer at TP8, 64 tokens", "Llama-3-8B's shape, 32 layers, 64 tokens"
SHOTS = (
    Shot("page-before-after", R1, ("r1", "r1-fused"), 1500, 1000, script=CHOOSE.format("new")),
    Shot("page-one-layer", R1, ("r1",), 1500, 1000, script=TO_FLOW + CHOOSE.format("reduction")),
    Shot("page-dark", R1, ("r1", "r1-fused"), 1500, 1000, "dark", script=TO_FLOW + "at('.block', 620);"),
    Shot("page-phone", R1, ("r1", "r1-fused"), 390, 844, density=2, script=TO_FLOW),
    Shot("page-32-layers", LLAMA, ("llama", "llama-fused"), 1500, 1000, script=TO_FLOW + "at('.block.repeats', -420);"),
)
SCROLL = """const at = (selector, more) => {
  const view = document.querySelector('.view');
  view.scrollTop = view.querySelector(selector).offsetTop + more;
};"""


def r1() -> tuple[Any, ...]:
    """The demonstration's layer."""
    from normquant.demo.deepseek_layer import R1_TP8, build_fake, fake_inputs

    return (build_fake(R1_TP8), *fake_inputs(R1_TP8, 64))


def llama() -> tuple[Any, ...]:
    """A whole model of 32 layers and its token ids [1, 64]."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import normquant as nq
    from normquant.audit.capture.fake_build import to_gpu

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32,
        vocab_size=32000, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = nq.block_fp8(LlamaForCausalLM(config).eval())
    finally:
        torch.set_default_dtype(before)
    to_gpu(model)
    return model, torch.zeros(1, 64, dtype=torch.int64, device="cuda")


def audited(name: str) -> dict[str, Any]:
    """The audit of that name, kept from last time or made now."""
    kept = KEPT / f"{name}.json"
    if not kept.exists():
        import normquant as nq
        from normquant.demo.deepseek_layer import forward

        print(f"auditing {name}", file=sys.stderr, flush=True)
        calls: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
            "r1": (forward, r1),
            "llama": (lambda model, ids: model(input_ids=ids).logits, llama),
        }
        function, inputs = calls[name.removesuffix("-fused")]
        options = nq.inductor_options() if name.endswith("-fused") else None
        report = nq.audit(function, inputs, target="h100", options=options)
        KEPT.mkdir(parents=True, exist_ok=True)
        kept.write_text(report.to_json(indent=None))
    return json.loads(kept.read_text())


def page_of(shot: Shot) -> Path:
    """The page that a picture is taken of."""
    from normquant.report.page import html

    reports = [audited(name) for name in shot.audits]
    shown = html.Compared([reports], SIDES[: len(reports)] if len(reports) > 1 else (html.SINGLE,))
    path = KEPT / f"{shot.name}.html"
    path.write_text(html.page(shown, shot.title), encoding="utf-8")
    return path


def take(browser: Any, shot: Shot) -> Path:
    """Take one picture, with a palette of few colours."""
    from PIL import Image

    tab = browser.new_page(
        viewport={"width": shot.width, "height": shot.height},
        color_scheme=shot.scheme,
        device_scale_factor=shot.density,
    )
    tab.goto(page_of(shot).as_uri())
    tab.evaluate(f"() => {{ {SCROLL} {shot.script} }}")
    tab.wait_for_timeout(300)  # transitions
    path = ROOT / "docs" / f"{shot.name}.png"
    tab.screenshot(path=path)
    tab.close()
    picture = Image.open(path).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    return path


def main() -> int:
    """All pictures, or those that are named."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for shot in SHOTS:
            if len(sys.argv) < 2 or shot.name in sys.argv[1:]:
                path = take(browser, shot)
                print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.0f} kB")
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
