"""`normquant demo` itself: one whole run, and what it says where something is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'normquant[hf]'")
pytest.importorskip("triton", reason="needs triton: pip install 'normquant[nogpu]'")

from normquant.cli import demo as command
from normquant.cli import entry as cli

SRC = Path(__file__).parents[2] / "src"
NORMS = ["input_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "post_attention_layernorm"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("demo")
    files = {"--json": folder / "demo.json", "--html": folder / "demo.html"}
    argv = [sys.executable, "-m", "normquant", "demo", *(str(part) for pair in files.items() for part in pair)]
    path = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    data, page = json.loads(files["--json"].read_text()), files["--html"].read_text()
    return SimpleNamespace(out=done.stdout, err=done.stderr, json=data, page=page)


def test_json_has_the_documented_form(whole_run: SimpleNamespace) -> None:
    data = whole_run.json
    for side in ("before", "after"):
        assert type(data[side]["kernels"]) is int and type(data[side]["bytes"]) is int
        assert sorted(data[side]["findings"]) == ["identity", "layout-copy"]
    assert sorted(site["name"] for site in data["sites"]) == sorted(NORMS)
    assert all(type(site["fused"]) is bool and site["reason"] for site in data["sites"])
    assert type(data["exact"]) is bool and type(data["compared"]) is int and type(data["differ"]) is int
    assert sorted(data["error"]) == ["fused", "unfused"]
    assert (data["gpu"] is None) == (not torch.cuda.is_available())


def test_every_norm_becomes_one_kernel(whole_run: SimpleNamespace) -> None:
    before, after = whole_run.json["before"], whole_run.json["after"]
    assert [norm["name"] for norm in before["norms"]] == [norm["name"] for norm in after["norms"]]
    assert all(norm["kernels"] > 1 for norm in before["norms"])
    assert all(norm["kernels"] == 1 for norm in after["norms"])
    assert after["kernels"] < before["kernels"] and after["matrix_products"] == before["matrix_products"]
    assert all(site["fused"] for site in whole_run.json["sites"])
    assert after["findings"]["identity"] == 0
    assert after["findings"]["layout-copy"] <= before["findings"]["layout-copy"]


def test_bytes_are_those_of_the_shapes(whole_run: SimpleNamespace) -> None:
    m = whole_run.json["layer"]["tokens"]
    fused = {norm["name"]: norm["bytes"] for norm in whole_run.json["after"]["norms"]}
    for name, k in (("input_layernorm", 7168), ("self_attn.q_a_layernorm", 1536), ("self_attn.kv_a_layernorm", 512)):
        assert fused[name] == 2 * m * k + 2 * k + m * k + 4 * m * k // 128  # x, weight, fp8 values, scales
    k = 7168  # two addends and their sum
    assert fused["post_attention_layernorm"] == 3 * 2 * m * k + 2 * k + m * k + 4 * m * k // 128


def test_the_values_are_the_same(whole_run: SimpleNamespace) -> None:
    data = whole_run.json
    assert data["exact"] and data["exact_inputs"]["differ"] == 0
    assert data["compared"] == data["exact_inputs"]["compared"] + data["random_inputs"]["compared"] > 4_000_000
    assert data["differ"] <= 1e-5 * data["random_inputs"]["compared"]
    assert 0 < data["error"]["fused"] < 1.01 * data["error"]["unfused"] < 0.1


def test_progress_goes_to_stderr_and_the_report_to_stdout(whole_run: SimpleNamespace) -> None:
    phases = [line for line in whole_run.err.splitlines() if re.match(r"\[\d of \d in \d\d:\d\d", line)]
    assert len(phases) >= 5 and phases[-1].endswith("done"), whole_run.err
    assert all(name in whole_run.out for name in NORMS)
    assert "4 of 4 norms are one kernel now" in whole_run.out
    assert "inductor_options()" in whole_run.out.partition("Next")[2]
    assert max(map(len, whole_run.out.splitlines())) <= 110


def test_the_page_is_whole_and_loads_nothing(whole_run: SimpleNamespace) -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("link", "img", "iframe") and "src" not in dict(attrs)
            assert (dict(attrs).get("href") or "#").startswith("#")
            if tag not in ("meta", "input"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    tags = Tags()
    tags.feed(whole_run.page)
    assert tags.open == [] and "url(" not in whole_run.page
    assert all(name in whole_run.page for name in NORMS)
    assert "normquant.add_rms_norm_quant" in whole_run.page and "4 of 4 norms are one kernel now" in whole_run.page


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)  # as torch 2.14 expects it
sys.meta_path.insert(0, Blocked())
from normquant.cli.entry import main
raise SystemExit(main(["demo"]))
"""


@pytest.mark.parametrize(("package", "extra"), [("transformers", "hf"), ("triton", "nogpu")])
def test_a_missing_package_is_one_line(package: str, extra: str) -> None:
    source = BLOCK.format(package=package)
    path = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"normquant: error: normquant demo needs {package} ")
    assert line.endswith(f"install it with: pip install 'normquant[{extra}]'")


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from normquant.audit.capture import fake_gpu

    def ensure() -> None:
        raise RuntimeError("found no C++ compiler")

    monkeypatch.setattr(fake_gpu, "ensure_device_guard", ensure)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "normquant: error: found no C++ compiler"


def test_interrupting_it_is_clean(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(progress: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "require", lambda: None)
    monkeypatch.setattr("normquant.demo.demonstration.demonstrate", interrupted)
    assert cli.main(["demo"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[-1] == "normquant: interrupted"


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_path_that_cannot_be_written_is_said_at_once(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", option, str(tmp_path / "no" / "x")]) == 2
    assert "is not a directory, so" in capsys.readouterr().err
    assert cli.main(["demo", option, str(tmp_path)]) == 2
    assert "is a directory; the path of a file is accepted" in capsys.readouterr().err
