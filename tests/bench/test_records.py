"""Records: the command and the day that each one names, and the summary of its timing."""

import datetime
import sys

import torch

from normquant.bench.records import Provenance, current_command, current_run
from normquant.bench.timing import Timing, summary


def test_the_command_leaves_out_where_the_records_went(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["x", "bench", "layer", "--output", "/tmp/a", "--m", "1"])
    assert isinstance(current_run("1"), Provenance)
    assert current_run("1").command == "normquant bench layer --m 1"
    assert datetime.date.fromisoformat(current_run("1").date) <= datetime.date.today()


def test_the_command_can_be_given_to_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "bench", "kernels", "--providers", "NCCL + normquant,normquant"])
    assert current_command() == "normquant bench kernels --providers 'NCCL + normquant,normquant'"


def test_summary():
    assert summary([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(3.0, 1.4, 4.6, 5)
