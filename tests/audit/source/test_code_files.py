"""Where generated code is found on disk."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from shared.generated_code import ON, SEEDS

from normquant.audit import audit_path
from normquant.audit.source import code_files
from normquant.audit.source.code_files import Unusable


@pytest.mark.parametrize(("data", "reason"), [(b"\x7fELF\0\0", "binary"), (b"\xff\xfeasync_compile", "not UTF-8")])
def test_binary_files_are_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_bytes(data)
    with pytest.raises(Unusable, match=reason):
        audit_path(path)


def test_a_directory_with_unreadable_files_reports_them_and_audits_the_rest(tmp_path: Path) -> None:
    for folder in ("ab", "cd", "ef"):
        (tmp_path / folder).mkdir()
    (tmp_path / "ab" / "good.py").write_text(ON.read_text())
    (tmp_path / "ab" / "other.py").write_text("print('not generated')\n")
    (tmp_path / "ab" / "kernel.cubin").write_bytes(b"\0\1\2")
    (tmp_path / "cd" / "cut.py").write_text(ON.read_text()[:30_000])
    (tmp_path / "cd" / "binary.py").write_bytes(b"\0async_compile")
    (tmp_path / "ef" / "looped.py").symlink_to(tmp_path / "ef" / "looped.py")
    (report,) = audit_path(tmp_path, rows=(64,))
    assert len(report.programs) == 1 and report.programs[0].name.endswith("good.py")
    skipped = {Path(name).name: reason for name, reason in report.skipped}
    assert set(skipped) == {"cut.py", "binary.py", "looped.py"}
    assert "binary" in skipped["binary.py"]


def test_a_folder_without_generated_code_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "artifact.bin").write_bytes(b"\x80\x04pickle")
    with pytest.raises(Unusable, match="TORCH_LOGS=output_code"):
        audit_path(tmp_path)
    with pytest.raises(Unusable, match="no such file or directory"):
        audit_path(tmp_path / "nowhere")


@pytest.mark.parametrize("prefixed", [True, False], ids=["every line prefixed", "first line prefixed"])
def test_a_log_of_output_code(tmp_path: Path, prefixed: bool) -> None:
    prefix = "V0610 10:11:12.123000 4242 torch/_inductor/graph.py:2104] [0/0] [__output_code] "
    lines = ["I0610 10:11:11.000000 4242 torch/other.py:1] something else"]
    for name in ("conv.py", "user.py"):
        code = ["Output code: ", *(SEEDS / name).read_text().splitlines()]
        lines += [prefix + line if prefixed or index == 0 else line for index, line in enumerate(code)]
        lines.append(prefix + "Output code written to: /tmp/x.py")
    path = tmp_path / "run.log"
    path.write_text("\n".join(lines))
    (report,) = audit_path(path)
    assert len(report.programs) == 2 and not report.skipped
    direct = [audit_path(SEEDS / name)[0].bytes for name in ("conv.py", "user.py")]
    assert [p.bytes for p in report.programs] == direct
    path.write_text(lines[0] + "\n" + prefix)
    with pytest.raises(Unusable, match="log without generated code"):
        code_files.find(path)


def trace(*names: str) -> str:
    """A log as TORCH_TRACE writes it, of a seed or of the C++ of that name."""
    head = "V1126 14:26:48.588000 18758 torch/_inductor/graph.py:2745] "
    lines = [head + '{"chromium_event": {}, "has_payload": "70"}', "\t{", '\t"name": "dynamo"', "\t}"]
    for name in names:
        lines.append(head + '{"inductor_output_code": {"filename": "/tmp/c.py"}, "frame_id": 0, "has_payload": "71"}')
        lines += ["\t" + line for line in (CPP.get(name) or (SEEDS / name).read_text()).splitlines()]
        lines += [head + '{"artifact": {"name": "fx_graph"}}', "\tasync_compile = None  # of the artifact"]
    return "\n".join(lines)


def test_a_log_and_a_folder_of_torch_trace(tmp_path: Path) -> None:
    path = tmp_path / "dedicated_log_torch_trace_rank_0_x.log"
    path.write_text(trace("conv.py", "user.py"))
    (tmp_path / "other.log").write_text("not a trace")
    direct = [audit_path(SEEDS / name)[0].bytes for name in ("conv.py", "user.py")]
    for where in (path, tmp_path):
        (report,) = audit_path(where)
        assert [p.bytes for p in report.programs] == direct and not report.skipped
    path.write_text(trace())
    with pytest.raises(Unusable, match="log without generated code of TORCH_TRACE"):
        audit_path(path)


CPP = {
    "wrapper.wrapper.cpp": "#include <torch/csrc/inductor/aoti_include/cuda.h>\n",
    "loaded.py": 'cpp_wrapper_src = (\nr"""\n#include <torch/csrc/inductor/cpp_wrapper/cuda.h>\n"""\n)\n# AOT ID',
}


@pytest.mark.parametrize("name", CPP)
def test_wrappers_in_cpp_are_named_for_what_they_are(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(CPP[name])
    for where in (path, tmp_path):
        with pytest.raises(Unusable, match=r"generated in C\+\+, by cpp_wrapper or AOTInductor"):
            audit_path(where)
    (tmp_path / "good.py").write_text(ON.read_text())
    (report,) = audit_path(tmp_path)
    assert [Path(skipped).name for skipped, _ in report.skipped] == [name]


def test_a_trace_of_wrappers_in_cpp_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "dedicated_log_torch_trace_rank_0_x.log"
    path.write_text(trace("loaded.py"))
    for where in (path, tmp_path):
        with pytest.raises(Unusable, match=r"graph 0: a wrapper that Inductor generated in C\+\+"):
            audit_path(where)
    path.write_text(trace("loaded.py", "conv.py"))
    (report,) = audit_path(path)
    assert [name for name, _ in report.skipped] == [f"{path}, graph 0"]


def test_a_package_of_aot_inductor_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/aotinductor/model/c.wrapper.cpp", CPP["wrapper.wrapper.cpp"])
    for where in (path, tmp_path):
        with pytest.raises(Unusable, match="a zip archive; if it is a package of AOTInductor, its code is C"):
            audit_path(where)
