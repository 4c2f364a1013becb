#!/usr/bin/env bash
# A vLLM server with the plugin on: starts it, sends one request, stops it, and shows what was fused.
#
#   examples/vllm_server.sh deepseek-ai/DeepSeek-R1 --tensor-parallel-size 8
#
# Options after the model are vLLM's. PORT chooses another port than 8000.
set -euo pipefail
model=${1:?usage: $0 MODEL [options of vllm serve]}
shift
port=${PORT:-8000}

NORMQUANT=1 vllm serve "$model" --port "$port" --served-model-name model "$@" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT

until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health"; do
  kill -0 "$server" 2>/dev/null || { echo "the server ended before it answered" >&2; exit 1; }
  sleep 1
done
curl --silent --fail "http://127.0.0.1:$port/v1/completions" --header "Content-Type: application/json" \
  --data '{"model": "model", "prompt": "t5 t6 t7 t8", "max_tokens": 6, "temperature": 0}'
echo
normquant vllm-report
