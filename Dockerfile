# rlloop with vLLM and the megatron trainer on NVIDIA GPUs: docker build -t rlloop . && docker run --gpus all --shm-size 16g -it rlloop
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential git python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/rlloop PATH=/opt/rlloop/bin:$PATH
WORKDIR /src
COPY . .
RUN python3 -m venv $VIRTUAL_ENV && pip install --no-cache-dir uv && uv pip install --no-cache --no-deps -r requirements/gpu.txt .
WORKDIR /workspace
CMD ["rlloop", "--help"]
