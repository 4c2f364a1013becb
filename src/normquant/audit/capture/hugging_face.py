"""A Hugging Face model from its config file alone, as something to audit: no weights are read or downloaded."""

import os
from collections.abc import Callable
from typing import Any

import torch

from normquant.audit.capture import live_compile as capture


def builder(
    config_file: str | os.PathLike[str], tokens: int, layers: int | None = None
) -> Callable[[], tuple[Any, ...]]:
    """A function that builds (model, token ids [1, tokens] int64) where tensors are fake, for `audit`'s `make_inputs`.

    Args:
        config_file: a config.json, or the folder that holds it.
        layers: build only this many layers; all when None.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the file is not a model's config.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("auditing a model by its config needs transformers: pip install 'normquant[hf]'") from error
    try:
        config = AutoConfig.from_pretrained(config_file, local_files_only=True)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{config_file}: not a transformers config file ({' '.join(str(error).split())[:200]})"
        ) from None
    if layers is not None:
        config.num_hidden_layers = layers
    config.use_cache = False

    def build() -> tuple[Any, ...]:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # weights are made in it: a fake module cannot be converted afterwards
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        finally:
            torch.set_default_dtype(dtype)
        capture.to_gpu(model)  # transformers makes real tensors on the default device to look at it
        return model, torch.zeros(1, tokens, dtype=torch.int64, device="cuda")

    return build


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What is compiled: token ids [1, tokens] int64 to logits [1, tokens, vocabulary]."""
    return model(input_ids=ids).logits
