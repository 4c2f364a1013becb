"""`normquant audit`: what it prints, and its exit codes."""

from __future__ import annotations

import argparse
import json
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from shared import generated_code

from normquant.audit.capture import fake_gpu
from normquant.cli import audit as command

ON, OFF = str(generated_code.ON), str(generated_code.OFF)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*arguments]))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the working directory."""
    text = (
        "import torch\nfrom torch import nn\n"
        "def double(x, factor=2):\n    return x * factor\n"
        "def row():\n    return torch.empty(8, 16, device='cuda')\n"
        "def build():\n    return double, (row(),)\n"
        "def wrong():\n    return 3\n"
        "def layer():\n"
        "    import normquant as nq\n"
        "    norm = torch.nn.RMSNorm(512, dtype=torch.bfloat16)\n"
        "    linear = nq.block_fp8(torch.nn.Sequential(norm, torch.nn.Linear(512, 128, dtype=torch.bfloat16)))\n"
        "    return linear, lambda: torch.empty(8, 512, dtype=torch.bfloat16)\n"
        "def few():\n    return double, ()\n"
        "linear = nn.Linear(16, 4)\nNUMBER = 3\n"
    )
    (tmp_path / "users_model.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_model", raising=False)  # of another test
    return "users_model"


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ON, "--m", "64") == 0
    out = capsys.readouterr().out
    assert "4 generated kernels, 10 opaque calls" in out and "s72 = 64" in out
    assert "error: mutated-input-copy in triton_poi_fused_0, 1.75 MiB" in out
    assert "error: dropped-ue8m0 in _C.rms_norm_per_block_quant (3 times)" in out


def test_several_sizes_begin_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ON, "--m", "1,64,8192") == 0
    out = capsys.readouterr().out
    assert out.index("s72 = 8192") < out.index("generated kernels") and out.count("generated kernels") == 3


def test_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(ON, "--m", "64", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["findings"][0]["rule"] == "mutated-input-copy"
    path = tmp_path / "report.json"
    assert run(ON, "--m", "1,64", "--json", str(path)) == 0
    assert [one["sizes"] for one in json.loads(path.read_text())] == [{"s72": 1}, {"s72": 64}]
    assert "generated kernels" in capsys.readouterr().out, "a file is written beside the text"


def test_exit_codes_of_findings_and_expectations(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ON, "--m", "64", "--fail-on", "identity,layout-copy") == 0
    assert run(ON, "--m", "64", "--fail-on", "mutated-input-copy") == 1
    assert "failed: mutated-input-copy in triton_poi_fused_0: copies the input arg6_1" in capsys.readouterr().err
    assert run(ON, "--m", "64", "--expect", "rms_norm_per_block_quant=3", "--expect", "kernels=4") == 0
    assert run(ON, "--m", "64", "--expect", "rms_norm_per_block_quant=6", "--expect", "triton_*=4") == 1
    assert "failed: expected 6 of rms_norm_per_block_quant, the code launches 3" in capsys.readouterr().err
    assert run(ON, "--m", "64", "--max-bytes", "100M") == 0
    assert run(ON, "--m", "64", "--max-bytes", "90M") == 1
    assert run("--diff", OFF, ON, "--m", "64", "--fail-on", "mutated-input-copy") == 1
    assert run("--diff", ON, OFF, "--m", "64", "--fail-on", "mutated-input-copy") == 0, "it is about what came"


@pytest.mark.parametrize(
    "arguments", [["--fail-on", "no-such-rule"], ["--m", "0"], ["--m", "x"], ["--max-bytes", "many"]]
)
def test_wrong_options_exit_with_2_and_say_what_is_accepted(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(ON, *arguments)
    assert caught.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_unusable_input_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binary = tmp_path / "binary.py"
    binary.write_bytes(b"\0\1")
    for what in (str(binary), str(tmp_path), str(tmp_path / "nowhere")):
        assert run(what) == 2
        error = capsys.readouterr().err
        assert error.startswith("normquant: error: ") and error.count("\n") == 1 and what in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to audit"),
        ([ON, "--expect", "x"], "--expect 'x': give NAME=NUMBER"),
        ([ON, "--size", "s1=4"], "its symbolic sizes are s72"),
        ([ON, "--target", "a100"], "unknown target 'a100'"),
        ([ON, "--diff", ON, OFF], "is a third"),
        ([ON, "--compare-fused"], "--compare-fused is not read with generated code"),
        (["users_model:layer", "--compare-fused", "--fuse"], "--compare-fused is not read with --fuse"),
        (["--diff", ON, OFF, "--compare-fused"], "--compare-fused is not read with --diff"),
        (["users_model:layer", "--compare-fused", "--github"], "--github is not read with --compare-fused"),
        (["--diff", ON, OFF, "--github"], "--github is not read with --diff"),
        ([ON, "--arg", "bf16[1]"], "--arg is not read with generated code"),
        ([ON, "--fuse", "--dynamic"], "--fuse is not read with generated code; --dynamic is not read with"),
        (["--diff", ON, OFF, "--option", "x=1"], "--option is not read with generated code"),
        (["some_module:f", "--tokens", "3"], "--tokens is not read with module:callable"),
    ],
)
def test_wrong_input_is_a_value_error(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*arguments)


def test_a_user_s_function(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{model}:double", "--arg", "bf16[64,512]", "--arg", "3", "--expect", "kernels=1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 2 * 64 * 512 * 2
    assert run(f"{model}:double", "--arg", f"{model}:row", "--json") == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 2 * 8 * 16 * 4
    assert run(f"{model}:build", "--json") == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 2 * 8 * 16 * 4
    assert run(f"{model}:linear", "--arg", "f32[8,16]", "--json") == 0
    assert json.loads(capsys.readouterr().out)["extern"] == [{"name": "aten.addmm", "count": 1}]


def test_a_user_s_function_at_several_sizes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{model}:double", "--arg", "bf16[64,512]", "--dynamic", "--m", "1,128", "--json") == 0
    assert [one["bytes"] for one in json.loads(capsys.readouterr().out)] == [2 * 512 * 2, 2 * 128 * 512 * 2]


@pytest.mark.parametrize(
    ("what", "more", "message"),
    [
        ("wrong", [], "must give .function or module, inputs."),
        ("missing", [], "has no 'missing'"),
        ("NUMBER", [], "not a function or module, but int"),
        ("double", ["--arg", "q8[3]"], "give a tensor as dtype"),
        ("double", ["--arg", "1", "--option", "x"], "give NAME=VALUE"),
    ],
)
def test_what_cannot_be_compiled_is_refused(model: str, what: str, more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(f"{model}:{what}", *more)


def test_a_transformers_model_by_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert run(str(path), "--tokens", "16", "--layers", "1", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kernels"] and any(e["name"].startswith("aten.") for e in data["extern"])
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a transformers config file"):
        run(str(path))


@pytest.mark.parametrize("gate", [["--fail-on", "identity"], ["--expect", "rms_norm_quant=0"], ["--max-bytes", "1G"]])
def test_a_gate_over_nothing_launched_fails(model: str, gate: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("users_view.py").write_text("def flat(x):\n    return x.view(-1)\n")
    what = ["users_view:flat", "--arg", "bf16[8,16]"]
    assert run(*what) == 0
    assert run(*what, *gate) == 1
    assert "failed: the code launches nothing, so there is nothing to check" in capsys.readouterr().err
    assert run(*what, *gate, "--expect", "kernels=0") == 0


def test_outputs_are_checked_before_the_compile(model: str, tmp_path: Path) -> None:
    Path("users_mistake.py").write_text("raise AssertionError('imported')\n")
    for option in ("--html", "--json"):
        with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
            run("users_mistake:build", option, str(tmp_path / "nowhere" / "out"))


def test_a_user_without_a_home_can_compile(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    fake_gpu.ensure_device_guard.cache_clear()
    for home in (None, "/proc/nowhere"):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
        monkeypatch.setattr(pwd, "getpwuid", unknown)
        assert run(f"{model}:build", "--expect", "kernels=1") == 0


def test_annotations(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ON, "--m", "64", "--github") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("::error file=") and "title=mutated-input-copy%3A triton_poi_fused_0::" in lines[0]
    assert any(line.startswith("::warning ") for line in lines) and any(line.startswith("::notice ") for line in lines)


def test_diff_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--diff", OFF, ON, "--m", "64", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["findings"]["mutated-input-copy"] == [0, 1]
    assert {change["origin"]: change["count"] for change in data["changes"]}["_C.rms_norm_per_block_quant"] == [0, 3]


def test_a_model_made_on_the_cpu_is_audited_as_it_is_and_fused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{model}:layer", "--expect", "rms_norm_quant=0", "--expect", "group_quant=1") == 0
    assert run(f"{model}:layer", "--fuse", "--expect", "rms_norm_quant=1", "--expect", "group_quant=0") == 0
    assert "1 of 1 norm -> quant sites fused (policy auto)" in capsys.readouterr().out


def test_a_model_that_does_not_compile_is_one_line(model: str) -> None:
    with pytest.raises(ValueError, match=r"few does not compile: TypeError: double\(\) missing 1 required"):
        run(f"{model}:few")


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full_disk(self: Path, text: str, **how: str) -> None:
        self.touch()
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        for arguments in ([ON], ["--diff", OFF, ON]):
            with pytest.raises(OSError, match="No space left"):
                run(*arguments, "--m", "64", "--html", str(path))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert run(ON, "--m", "64", "--html", str(path)) == 0
    assert path.read_text().startswith("<!doctype html>")


def test_before_and_after_of_a_model(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert run(f"{model}:layer", "--compare-fused", "--html", str(page), "--expect", "rms_norm_quant=1") == 0
    out = capsys.readouterr().out
    assert "before: torch.compile\nafter:  with normquant" in out and "+  normquant.rms_norm_quant" in out
    assert "1 of 1 norm -> quant sites fused (policy auto)" in out
    text = page.read_text()
    assert 'class="row fused new"' in text and 'class="row fused gone"' in text and "block_fp8_linear" in text
    assert run(f"{model}:layer", "--compare-fused", "never", "--expect", "rms_norm_quant=0", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["changes"] == [] and all(before == after for before, after in data["findings"].values())


def test_a_comparison_with_a_stored_audit(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline, page = str(tmp_path / "baseline.json"), tmp_path / "page.html"
    assert run(f"{model}:layer", "--json", baseline) == 0
    assert run("--diff", baseline, f"{model}:layer", "--html", str(page)) == 0
    out = capsys.readouterr().out
    assert f"before: {baseline}" in out and "the same launches with the same bytes" in out
    assert ">baseline.json</p>" in page.read_text() and 'class="tint' not in page.read_text()
    assert run("--diff", OFF, baseline, "--m", "64", "--expect", "group_quant=1") == 0
    assert run(baseline, "--html", str(page), "--expect", "rms_norm_quant=1") == 1
    assert "failed: expected 1 of rms_norm_quant, the code launches 0" in capsys.readouterr().err
    assert page.read_text().startswith("<!doctype html>")
    assert "not read with a stored audit" in _refused(baseline, "--m", "64")


def _refused(*arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        run(*arguments)
    return str(caught.value)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    baseline = str(tmp_path / "baseline.json")
    assert run(ON, "--m", "1,64", "--json", baseline) == 0
    assert "has 2 sets of sizes" in _refused("--diff", baseline, ON, "--m", "64")
    assert run("--diff", baseline, ON, "--m", "1,64", "--html", str(tmp_path / "page.html")) == 0
    assert (tmp_path / "page.html").read_text().count('data-show="') == 2
    said = _refused("--diff", baseline, ON, "--m", "1,64", "--target", "h200")
    assert "was audited for h100" in said and "for h200: give the same --target" in said


def test_differences_at_several_sizes_are_one_json(tmp_path: Path) -> None:
    path = tmp_path / "diff.json"
    assert run("--diff", OFF, ON, "--m", "1,64", "--json", str(path)) == 0
    assert [sorted(one) for one in json.loads(path.read_text())] == [["changes", "findings"]] * 2


def test_generated_code_is_audited_without_torch() -> None:
    run = f"import sys; from normquant.cli.entry import main; main(['audit', {ON!r}, '--m', '64'])"
    code = f"{run}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
