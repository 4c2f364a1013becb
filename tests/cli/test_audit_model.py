"""`normquant audit` of models as people build them, and what it says where that fails."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import normquant as nq
from normquant.cli import audit as command

MODEL = """
import torch, normquant as nq
from torch import nn

def net():
    return nn.Sequential(nn.RMSNorm(256), nn.Linear(256, 128))

def x():
    return torch.randn(64, 256)

def bfloat16(): return net().bfloat16(), (x().bfloat16(),)
def to_dtype(): return net().to(torch.bfloat16), [x().to(torch.bfloat16)]
def half_cuda(): return net().half().cuda(), x().half().cuda()
def to_both(): return net().to("cuda", torch.bfloat16), (x().to("cuda", torch.bfloat16),)
def under_device():
    with torch.device("cuda"):
        return net().bfloat16().eval(), (x().bfloat16(),)
def by_name(): return net().bfloat16(), {"input": x().bfloat16()}
def made_later(): return net().bfloat16(), lambda: x().bfloat16()
def in_a_function():
    model = net().bfloat16()
    return (lambda y: model(y)), x().bfloat16()
def a_method(): return net().bfloat16().forward, x().bfloat16()
def of_numbers():
    factor = torch.tensor([2.0]).cuda().bfloat16()
    return (lambda m, y, z: m(y) * z), (net().bfloat16(), x().bfloat16(), factor)
def of_values():
    rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]
    return nn.Sequential(*net(), nn.Dropout(rates[1])).bfloat16().eval(), x().bfloat16()
def tied():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    model[1].weight = model[0].weight
    model.half().cuda()
    assert model[1].weight is model[0].weight
    return model, x().half()
def loaded():
    model = net()
    model.load_state_dict(torch.load(STATE))
    return model.bfloat16(), x().bfloat16()

module = net().half().cuda()
STATE = "state.pt"
torch.save(net().state_dict(), STATE)

def helper(y):
    return y @ torch.randn(4, 4)  # the line that fails
def raises(): return helper(torch.randn(3))
def fails_compiled(): return helper, (torch.randn(3, 3),)
def mixed():
    cpu = torch.ones(2)
    return (lambda y: y * cpu), torch.ones(2)
def nothing(): pass
def three(): return net(), x(), x()
def sized(n): pass
"""
FAILS = MODEL[: MODEL.index("the line that fails")].count("\n") + 1


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, in which the command runs."""
    (tmp_path / "as_built.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "as_built", raising=False)
    return tmp_path


def audit(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*arguments]))


@pytest.mark.parametrize("function", [
    *("bfloat16", "to_dtype", "half_cuda", "to_both", "under_device", "by_name", "made_later", "in_a_function"),
    *("a_method", "of_numbers", "of_values", "tied", "loaded"),
])  # fmt: skip
def test_a_model_is_built_as_everybody_does(function: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(f"as_built:{function}", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in data["extern"]} <= {"aten.addmm", "aten.mm"} and data["extern"]


def test_a_model_of_the_module_and_a_file_by_its_path(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit("as_built:module", "--arg", "f16[8,256]", "--expect", "kernels=1") == 0
    (folder / "models").mkdir()
    (folder / "models" / "elsewhere.py").write_text(
        "import beside\n\n\ndef build():\n    return beside.double, beside.X\n"
    )
    (folder / "models" / "beside.py").write_text("import torch\nX = torch.ones(4)\ndef double(x):\n    return x * 2\n")
    assert audit("models/elsewhere.py:build", "--expect", "kernels=1") == 0
    assert audit(str(folder / "models" / "elsewhere.py") + ":build", "--expect", "kernels=1") == 0


def test_a_pretrained_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 320}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads)).save_pretrained("saved")
    Path("pretrained.py").write_text(
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        "def build():\n"
        "    model = AutoModelForCausalLM.from_pretrained('saved', dtype=torch.bfloat16).cuda().eval()\n"
        "    return model, {'input_ids': torch.zeros(1, 16, dtype=torch.int64, device='cuda')}\n"
    )
    assert audit("pretrained:build", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert sum(one["count"] for one in data["extern"]) >= 8, "seven products and the output layer"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("as_built:raises", rf"^as_built\.py:{FAILS}: RuntimeError: .*reduction dim"),
        ("as_built:fails_compiled", rf"^as_built\.py:{FAILS}: TorchRuntimeError: .*reduction dim"),
        ("as_built:mixed", "mixes tensors of the CPU and of the GPU.*make those with device='cuda'"),
        ("as_built:nothing", r"as_built:nothing\(\) must give .function or module, inputs., and gave None"),
        ("as_built:three", "and gave tuple of Sequential, "),
        ("as_built:sized", "missing a required argument: 'n'; give inputs for what is to be compiled"),
        ("as_built:module", "as_built:module is a module: give its inputs, such as --arg"),
        ("as_built:bfloat61", r"as_built\.py has no 'bfloat61'; did you mean bfloat16"),
        ("as_bulit:bfloat16", "no module 'as_bulit' in .*; did you mean as_built"),
        ("./as_bulit.py:bfloat16", r"as_bulit\.py: no such file; did you mean as_built\.py"),
        ("lacks:f", r"^lacks\.py:1: ModuleNotFoundError: No module named 'not_there'"),
        ("wrong:f", r"^wrong\.py:1: SyntaxError: "),
    ],
)
def test_what_fails_is_said_with_the_user_s_line(what: str, message: str, folder: Path) -> None:
    (folder / "lacks.py").write_text("import not_there\n")
    (folder / "wrong.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match=message):
        audit(what)


def test_a_file_that_is_no_generated_code_is_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit("as_built.py") == 2
    assert "to compile what it defines, name it: as_built.py:build" in capsys.readouterr().err


def test_a_report_prints_as_text() -> None:
    import torch

    text = str(nq.audit(lambda x: x * 2, torch.ones(8)))
    assert text.startswith("generated code, for h100\n  1 generated kernel") and "triton_poi_fused_mul_0" in text
