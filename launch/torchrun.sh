#!/usr/bin/env bash
# Run a script on all GPUs of this machine, or on 2 CPU ranks where there is none.
#
#   launch/torchrun.sh [--nproc N] [--TORCHRUN-OPTION=VALUE ...] script.py args...
#   launch/torchrun.sh --nproc 2 -m ringfa3_launch bench attention --seqlens 4K
#
# --nproc N            ranks on this machine (default: one a GPU; 2 without GPUs)
# --name=value         handed to torchrun: --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=host:port
# PYTHON               the interpreter (default: the active virtual environment, else the clone's .venv, else python3)
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }

here=$(cd "$(dirname "$0")" && pwd)
if [[ -z "${PYTHON:-}" ]]; then
  if [[ -n "${VIRTUAL_ENV:-}" && -x "$VIRTUAL_ENV/bin/python" ]]; then
    PYTHON=$VIRTUAL_ENV/bin/python
  elif [[ -x "$here/../.venv/bin/python" ]]; then
    PYTHON=$here/../.venv/bin/python
  else
    PYTHON=python3
  fi
fi

nproc=
options=()
meeting=--standalone # a free port of this machine, unless the options say where the hosts meet
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --nproc) nproc=${2:?--nproc: wanted a number of ranks}; shift 2 ;;
    --nproc=*) nproc=${1#*=}; shift ;;
    -m) break ;;
    --nnodes=* | --rdzv[-_]*=* | --master[-_]*=* | --node[-_]rank=*) meeting=; options+=("$1"); shift ;;
    --*=*) options+=("$1"); shift ;;
    -*) echo "torchrun.sh: $1: wanted --nproc N or a torchrun option written --name=value" >&2; exit 2 ;;
    *) break ;;
  esac
done
if ((!$#)); then
  usage >&2
  echo "torchrun.sh: wanted a script, got none" >&2
  exit 2
fi
if [[ -z $nproc ]]; then
  nproc=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')
fi
if ! [[ $nproc =~ ^[1-9][0-9]*$ ]]; then
  echo "torchrun.sh: --nproc: wanted a number of ranks, got $nproc" >&2
  exit 2
fi

# Never NVLink multicast: a program that uses it can put a host's GPUs, which others share, out of service.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
export TORCH_SYMM_MEM_DISABLE_MULTICAST=${TORCH_SYMM_MEM_DISABLE_MULTICAST:-1}
export NVSHMEM_DISABLE_NVLS=${NVSHMEM_DISABLE_NVLS:-1}

# Cores are divided among the ranks (torchrun alone would give each rank one)
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}

exec "$PYTHON" -m torch.distributed.run ${meeting:+"$meeting"} --nproc-per-node="$nproc" ${options[@]+"${options[@]}"} "$@"
