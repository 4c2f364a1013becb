"""Rules about the scales of FP8 block quantization."""

from collections.abc import Iterator, Mapping, Sequence

from normquant.audit import operators, size_expressions
from normquant.audit.program import Extern, Program, ProgramLaunch, View
from normquant.audit.result import Draft
from normquant.audit.rules.data_flow import Flow

_ALIGNMENT = 4  # rows: DeepGEMM reads fp32 scales through TMA, which takes columns that start at multiples of 16 bytes
_TRIED_ROWS = (1, 2, 3, 5, 6, 7, 9, 4, 8, 64)  # every remainder modulo 4; small, as decode batches are


def dropped_ue8m0(flow: Flow, programs: Sequence[Program]) -> Iterator[Draft]:
    """Quantizations with any fp32 scale, where others in the model round their scales to powers of two."""
    asked = next((call for program in programs for call in program.externs if _ue8m0(call)), None)
    if asked is None:
        return
    for call in flow.program.externs:
        if _ue8m0(call) is False:
            yield Draft(
                call,
                0,
                f"quantizes with any fp32 scale, while {asked.name} in the same model rounds its scales to powers of "
                "two (UE8M0): the fusion changed the numbers",
                "use an operator that takes the scale encoding, or leave this site unfused",
                call.writes[0].buffer if call.writes else "",
            )


def _ue8m0(call: Extern) -> bool | None:
    return operators.uses_ue8m0(call.name, call.arguments)


def misaligned_scales(flow: Flow, programs: Sequence[Program]) -> Iterator[Draft]:
    """Scales that the GEMM has to copy into a column-major layout with padded columns before it can start."""
    for call in flow.program.externs:
        for position in operators.operator(call.name).takes_scales:
            view = call.views.get(position)
            rows = _misaligned_rows(view) if view is not None else None
            if view is None or rows is None:
                continue
            here = _is_misaligned(view, flow.program.sizes)
            size = sum(access.bytes for access in call.reads if access.buffer == view.buffer)
            yield Draft(
                _writer(flow, call, view.buffer),
                2 * size if here else 0,
                f"writes scales with strides ({', '.join(view.stride)}); {call.name} wants columns padded to "
                f"{_ALIGNMENT} rows and copies them first, as with {rows} row{'s' * (rows != 1)}",
                "write the scales column-major with the column stride rounded up to a multiple of 4 (layout col_tma)",
                view.buffer,
                int(here),
            )


def _writer(flow: Flow, call: Extern, buffer: str) -> ProgramLaunch:
    for edge in flow.into.get(call.position, ()):
        if edge.buffer == buffer and edge.producer is not None:
            return flow.program.launches[edge.producer]
    return call


def _misaligned_rows(view: View) -> int | None:
    """A number of rows for which the scales are misaligned, or None."""
    symbols = {name for text in (*view.shape, *view.stride) for name in _names(text)}
    for rows in _TRIED_ROWS if symbols else (0,):
        if _is_misaligned(view, dict.fromkeys(symbols, rows)):
            return rows or _size(view.shape[0], {}) or 0
    return None


def _is_misaligned(view: View, values: Mapping[str, int]) -> bool:
    """Whether [rows, groups] scales are not column-major with aligned columns."""
    if len(view.shape) != 2 or len(view.stride) != 2:
        return False
    rows, groups = (_size(text, values) for text in view.shape)
    row_step, column_step = (_size(text, values) for text in view.stride)
    if rows is None or groups is None or row_step is None or column_step is None or groups <= 1:
        return False
    aligned = -(-rows // _ALIGNMENT) * _ALIGNMENT
    return row_step != 1 or column_step != aligned


def _size(text: str, values: Mapping[str, int]) -> int | None:
    node = size_expressions.parse(text)
    try:
        return size_expressions.evaluate(node, values) if node is not None else None
    except size_expressions.UnknownSize:
        return None


def _names(text: str) -> set[str]:
    node = size_expressions.parse(text)
    return size_expressions.names(node) if node is not None else set()
