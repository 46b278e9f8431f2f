# An image with everything that a node needs: for Docker, Kubernetes (launch.kuberay.image) and, through pyxis or
# apptainer, Slurm (launch.slurm.container_image).
#
#     docker build -t swift-dist .                       # CUDA, with transformer-engine
#     docker build -t swift-dist:cpu --build-arg BUILD=cpu .
#
# CUDA is the version that torch's wheels bring; the toolkit and cuDNN of the base image compile transformer-engine.
ARG BUILD=cuda

FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04 AS base-cuda
FROM ubuntu:24.04 AS base-cpu

# hadolint ignore=DL3006
FROM base-${BUILD} AS image
ARG BUILD
# More words for pip when it installs torch, such as the index of the CPU build.
ARG TORCH_ARGS=""
# vLLM comes along where there is a build of it; "no" leaves it out.
ARG VLLM=""
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential ca-certificates git iproute2 ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY . /opt/swift_dist/source
WORKDIR /opt/swift_dist/source
RUN if [ "$BUILD" = cuda ]; then extras=gpu,trackers; else extras=trackers; fi \
    && VENV=/opt/swift_dist/venv EXTRAS=$extras PIP_NO_CACHE_DIR=1 bash .ci/install
# Ray asks for a token where this says so; without it Ray decides by the files that it finds.
ENV PATH="/opt/swift_dist/venv/bin:$PATH" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
WORKDIR /workspace
CMD ["swift-dist", "--help"]
