"""A shard of a decode step that a CPU runs in no time."""

from normquant.bench.shard_step import Shard

TINY = Shard(hidden=256, q_lora=128, kv_lora=128, rope=16, heads=2, nope=64, v=64, intermediate=128)
