"""What the kernels of several ranks become on Hopper: a wait ends for all threads at once, and nothing spills."""

from __future__ import annotations

import pytest
import torch
from shared.machine_code import SM_90, SM_100, Code, machine_code

from normquant import QuantSpec
from normquant.kernels import all_reduce_add_rms_norm_quant as kernels
from normquant.kernels import parts_plan
from normquant.kernels.configs import Config
from normquant.kernels.exchange_layout import Exchange
from normquant.kernels.launch import Launch
from normquant.kernels.partial_rows import PartialRows, row_stride

K, WORLD = 7168, 4
CONFIGS = (Config(4, split=8, cluster=True), Config(16, split=8, cluster=True), Config(16))


def compiled(
    algorithm: str, config: Config, wanted: tuple[bool, bool], sharded: bool = False, parts: int = 0, capability=SM_90
) -> Code:
    """parts: partial sums of a row of x, 0 for plain rows."""
    residual, weight = torch.empty(64, K, dtype=torch.bfloat16), torch.empty(K, dtype=torch.bfloat16)
    x = PartialRows(64, K, parts, residual.dtype, residual.device) if parts else residual
    memory = torch.empty(parts * 64, row_stride(K)) if parts else residual
    state, table = torch.zeros(2, dtype=torch.int32), torch.zeros(WORLD + 2, dtype=torch.int64)
    group = Exchange(1, WORLD, table, state, 1 << 24)
    args = (x, residual, weight, 1e-6, 0.0, QuantSpec(layout="col_tma"), parts_plan.Outputs(*wanted), group, config)

    def launch() -> None:
        plan = kernels.plan_one_shot(*args) if algorithm == "one shot" else kernels.plan_two_shot(*args, sharded)
        Launch(plan)(memory, residual, weight, table, state)

    return machine_code(launch, capability)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("wanted", [(True, False), (True, True)])
@pytest.mark.parametrize(("algorithm", "waits"), [("one shot", 1), ("two shots", 2)])
def test_a_wait_ends_for_all_threads_of_a_program_at_once(algorithm, waits, wanted, config):
    # A reduction over a tile says the same to the threads among which it is divided, and a tile of scales is held
    # by some of a warp's: only a barrier that combines what all threads saw keeps them together.
    code = compiled(algorithm, config, wanted)
    assert sum(line.startswith("BAR.RED.OR") for line in code.sass) == waits


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_two_shots_of_four_ranks_hold_all_they_wait_for_in_registers(config, sharded):
    code = compiled("two shots", config, (True, False), sharded)
    assert (code.local, code.stack) == (0, 0)


@pytest.mark.parametrize(("capability", "parts"), [(SM_90, 2), (SM_90, 3), (SM_100, 2)])  # two, where N is 7168
@pytest.mark.parametrize(("algorithm", "rows"), [("one shot", 1), ("two shots", WORLD)])
def test_partial_sums_are_read_wide_after_the_wait_and_become_words_where_they_are(algorithm, rows, capability, parts):
    config = Config(4, split=8, cluster=True, prefetch=True)  # eight values a thread
    plain, code = (compiled(algorithm, config, (True, False), parts=n, capability=capability) for n in (0, parts))
    assert (code.local, code.stack) == (0, 0)
    assert code.widths("LDG").count(128) == plain.widths("LDG").count(128) + rows * (2 * parts - 1)
    (wait,) = code.places("ACQBULK")
    wide = [at for at in code.places("LDG") if ".128" in code.sass[at]]
    assert wait < wide[0], "what the product writes is read before it has ended"
    assert "prefetch.global.L2" in plain.ptx and "prefetch.global.L2" not in code.ptx, "it is still to be written"
    for exchanged in ("LDS", "STS", "SHFL"):
        assert len(code.places(exchanged)) == len(plain.places(exchanged)), "a word's two values are in two threads"


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("parts", [2, 3])
def test_two_shots_hold_partial_sums_in_registers(parts, config):
    code = compiled("two shots", config, (True, False), parts=parts)
    assert (code.local, code.stack) == (0, 0)
