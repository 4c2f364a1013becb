"""What the kernels become where they read partial sums; their values are tested with the pairs of linear/."""

import pytest
import torch
from shared.machine_code import SM_90, SM_100, compiling, machine_code

from normquant import QuantSpec
from normquant.kernels.configs import config as choose_config
from normquant.kernels.launch import Launch
from normquant.kernels.partial_rows import PartialRows, row_stride
from normquant.ops import OPS, Examples

PARTS = {"add_rms_norm_quant": 2, "silu_mul_quant": 7, "latent_norm_quant": 8, "rope_last": 4, "group_quant": 2}
WIDTHS = {"add_rms_norm_quant": 7168, "silu_mul_quant": 2304, "latent_norm_quant": 1536, "rope_last": 3072}
SPEC = QuantSpec(layout="col_tma")


def launch(name: str, m: int, capability, like: int = 4) -> None:
    """The op's kernel on partial sums of rows as wide as DeepSeek-R1's, with the config of `like` rows."""
    op, k = OPS[name], WIDTHS.get(name, 2048)
    example = op.example(Examples(m, k, "cpu"))
    x = example.pop("x")
    rows = PartialRows(m, x.shape[1], PARTS[name], x.dtype, x.device)
    config = choose_config(op.configs, k, like, capability) if op.configs else None
    planned = Launch(op.plan(rows, *example.values(), SPEC, config=config))
    memory = torch.empty(PARTS[name] * m, row_stride(x.shape[1]))
    planned(memory, *(t for t in example.values() if isinstance(t, torch.Tensor)))


@pytest.mark.parametrize("capability", [SM_90, SM_100], ids=["sm_90", "sm_100"])
@pytest.mark.parametrize("name", PARTS)
def test_parts_are_read_wide_and_before_the_first_store(name, capability):
    code = machine_code(lambda: launch(name, 4, capability), capability)
    assert (code.stack, code.local) == (0, 0) and not code.places("LDL") and not code.places("STL")
    assert code.registers * code.threads <= 65536
    waits, loads, stores = (code.places(what) for what in ("ACQBULK", "LDG", "STG"))
    assert len(waits) == 1 and waits[0] < loads[0]
    assert code.widths("LDG").count(128) >= PARTS[name]
    if name != "latent_norm_quant":  # two programs of which each stores
        assert loads[-1] < stores[0]


def test_one_binary_for_every_number_of_rows():
    with compiling(SM_90) as kernels:
        for m in (1, 2, 16, 17):
            launch("silu_mul_quant", m, SM_90)
    assert len(kernels) == 4 and len(set(map(id, kernels))) == 1
