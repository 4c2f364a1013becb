"""What comments in generated code say: shapes, constants, and where a launch comes from."""

import ast
import re
from collections.abc import Iterator, Sequence

from normquant.audit import size_expressions
from normquant.audit.source.generated_module import Size, Tensor

_FRAGMENT = re.compile(r'^#\s+%(\w+) : Tensor "(\w+)\[([^\]]*)\]\[([^\]]*)\]')
_CONSTANT = re.compile(r"^(\w+) = None\s+# .*?torch\.(\w+) \(([^)]*)\) \(([^)]*)\)")
_ATEN = re.compile(r"Original ATen: \[([^\]]*)\]")
_FILE = re.compile(r"^\s*# File: (.+?):(\d+) in .*?, code: (.*)$")
_FX_DTYPES = {
    "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "i64": "int64", "i32": "int32",
    "i16": "int16", "i8": "int8", "u8": "uint8", "b8": "bool", "f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2",
    "f8e8m0fnu": "float8_e8m0fnu",
}  # fmt: skip


def constants(lines: Sequence[str]) -> Iterator[Tensor]:
    """The tensors that belong to the compiled program, such as frozen weights."""
    for line in lines:
        found = _CONSTANT.match(line) if " = None " in line else None
        if found:
            name, dtype, size, stride = found.groups()
            yield Tensor(name, name, dtype, _sizes(size), _sizes(stride))


def above(lines: Sequence[str], line: int) -> tuple[tuple[str, ...], tuple[tuple[str, int, str], ...]]:
    """The comments above a call in `line` (from 1): its graph operations, and the user's (file, line, code)."""
    aten: tuple[str, ...] = ()
    origins: list[tuple[str, int, str]] = []
    for index in range(min(line - 2, len(lines) - 1), max(-1, line - 14), -1):
        text = lines[index].strip()
        if not (text.startswith("#") or "get_raw_stream" in text or "numel = " in text):
            break
        found = _ATEN.search(text)
        if found and found.group(1):
            aten = tuple(part.strip() for part in found.group(1).split(","))
        located = _FILE.match(text)
        if located:
            origins.append((located.group(1), int(located.group(2)), located.group(3)))
    return aten, tuple(reversed(origins))


def elements(node: ast.expr) -> Size | None:
    """The items of a tuple or list."""
    return tuple(node.elts) if isinstance(node, (ast.Tuple, ast.List)) else None


def _sizes(text: str) -> Size | None:
    parsed = size_expressions.parse(f"[{text}]")
    return elements(parsed) if parsed is not None else None


def shapes(lines: Sequence[str]) -> Iterator[tuple[str, tuple[str, Size | None, Size | None]]]:
    """(name, (dtype, size, stride)), from the graph fragments that Inductor writes above each kernel."""
    seen: set[str] = set()
    for line in lines:
        found = _FRAGMENT.match(line) if line.startswith("#   %") else None
        if found and found.group(1) not in seen:
            name, dtype, size, stride = found.groups()
            seen.add(name)
            yield name, (_FX_DTYPES.get(dtype, ""), _sizes(size), _sizes(stride))
