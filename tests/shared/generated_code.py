"""Generated modules for tests: kept ones, and small ones made of a kernel's body and a call."""

from __future__ import annotations

from pathlib import Path

from normquant.audit.program import GeneratedCode, Program
from normquant.audit.source import evaluate, wrapper_code
from normquant.audit.source.generated_module import GeneratedModule

FIXTURES = Path(__file__).parents[1] / "audit" / "fixtures"
SEEDS = FIXTURES / "seeds"
ON, OFF = FIXTURES / "fuse_norm_quant_on_layer.py", FIXTURES / "fuse_norm_quant_off_layer.py"
KERNEL = """
@triton_heuristics.pointwise(
    size_hints={'x': 4096},
    triton_meta={'signature': {'in_ptr0': '*bf16', 'out_ptr0': '*bf16', 'xnumel': 'i32', 'XBLOCK': 'constexpr'}},
    inductor_meta={'mutated_arg_names': []},
)
@triton.jit
def triton_poi_fused_0(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    xnumel = 4096
    xindex = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:]
    xmask = xindex < xnumel
    x0 = xindex % 64
    x1 = xindex // 64
    BODY
"""
COPY = "tmp0 = tl.load(in_ptr0 + (x0 + 64*x1), xmask)\ntl.store(out_ptr0 + (xindex), tmp0, xmask)"


def module(body: str, call: str = "triton_poi_fused_0.run(arg0_1, buf0, 4096, stream=stream0)") -> str:
    """A generated module with one kernel."""
    kernel = KERNEL.replace("BODY", "\n    ".join(body.strip().splitlines()))
    return f"""# AOT ID: ['0_inference']
async_compile = AsyncCompile()
triton_poi_fused_0 = async_compile.triton('triton_poi_fused_0', '''{kernel}''', device_str='cuda')
def call(args):
    arg0_1, = args
    args.clear()
    assert_size_stride(arg0_1, (64, 64), (64, 1))
    buf0 = empty_strided_cuda((64, 64), (64, 1), torch.bfloat16)
    {call}
    return (buf0, )
"""


def parsed(text: str) -> GeneratedModule:
    return wrapper_code.read_module(GeneratedCode("test", text))


def program(text: str, **sizes: int) -> Program:
    return evaluate.program(parsed(text), sizes, {})


def bytes_moved(text: str) -> list[tuple[str, int, int]]:
    return [(launch.name, launch.bytes_read, launch.bytes_written) for launch in program(text).launches]
