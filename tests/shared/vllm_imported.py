"""Imports vLLM and compiles once; `shared.forked_engines` forks the process that imports this."""

from __future__ import annotations

import torch
import vllm.model_executor.models.deepseek_v2
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker  # noqa: F401

torch.compile(lambda x: x + 1)(torch.zeros(2))
torch.compiler.reset()
