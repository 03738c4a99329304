# Python, the locked packages and this code, without root: for KubeRay, and wherever containers run.
#   docker build --tag cromss-dist .                                                             torch for GPUs, as PyPI has it
#   docker build --tag cromss-dist:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# TORCH_INDEX is a further package index, of another CUDA (.../whl/cu128) or of none; builds of the locked version there win.
# --build-arg REVISION=$(git rev-parse HEAD) is what runs record as their code.
#
# The digest is that of Python 3.11.16 on Debian 12, as Docker Hub had it on 2026-09-21; of a newer one:
# docker buildx imagetools inspect python:3.11-slim-bookworm
ARG BASE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
# hadolint ignore=DL3006
FROM ${BASE}

# wget: KubeRay's probes. No versions: Debian keeps the newest alone, so that a pin breaks the build at each security fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libexpat1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home cromss \
    && python -m venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# The layer that takes minutes and gigabytes: it is made again only when the lock changes.
ARG TORCH_INDEX=""
COPY requirements.lock /opt/cromss/
RUN python -m pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --requirement /opt/cromss/requirements.lock

WORKDIR /opt/cromss
COPY pyproject.toml README.md LICENSE ./
COPY tools tools
COPY configs configs
COPY launch launch
COPY cromss_dist cromss_dist
RUN python -m pip install --no-deps --no-build-isolation --editable . \
    && python -m pip check

ARG REVISION=unknown
LABEL org.opencontainers.image.revision=$REVISION
RUN printf '{"revision": "%s"}\n' "$REVISION" > code.json

# Closed unless told otherwise: a Ray without a token does not start. Output at once, since logs are read while it runs.
ENV RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# By number: Kubernetes cannot tell that a name is not root.
USER 1000:1000
CMD ["cromss", "--help"]
