# syntax=docker/dockerfile:1
# An image for clusters, whose entry point is `accelerate launch`:
#   docker build --build-arg COMMIT=$(git rev-parse HEAD) -t vaedist .
#   docker run --gpus all vaedist vaedist/train.py recipe=quickstart
#
# CUDA's libraries are among the locked packages and the driver is the host's (by nvidia-container-toolkit): a base with
# a CUDA of its own would only be larger.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
# A compiler is for Triton's launchers on a GPU, and for train.compile=true on a CPU.
# hadolint ignore=DL3008
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends g++ tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log

# What runs need of the lock, and nothing else: a package that the lock lacks, or whose hash is another, is refused, and
# so is what builds one. ARGs, since these settings are not the image's. The largest packages have layers of their own,
# which are fetched at the same time. Nobody who runs the image could write the bytecode later.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
ARG UV_REQUIRE_HASHES=1
ARG UV_CONSTRAINT=requirements.lock
ARG UV_BUILD_CONSTRAINT=requirements.lock
ARG UV_COMPILE_BYTECODE=1
ARG UV_CACHE_DIR=/var/cache/uv
ARG UV_LINK_MODE=copy
RUN pip install --quiet --no-cache-dir --root-user-action=ignore --target /opt/uv uv==0.13.9
WORKDIR /opt/vaedist
COPY requirements.lock ./
# hadolint ignore=SC2046
RUN --mount=type=cache,target=/var/cache/uv \
    /opt/uv/bin/uv venv --quiet --no-python-downloads /opt/venv \
 && /opt/uv/bin/uv pip install --quiet $(grep -o '^nvidia-[^ ]*' requirements.lock)
# hadolint ignore=SC2046
RUN --mount=type=cache,target=/var/cache/uv \
    /opt/uv/bin/uv pip install --quiet $(grep -o '^torch==[^ ]*' requirements.lock) \
 && find /opt/venv -name '*.a' -delete
COPY pyproject.toml ./
# hadolint ignore=SC2046
RUN --mount=type=cache,target=/var/cache/uv \
    /opt/uv/bin/uv pip install --quiet \
      $(/opt/uv/bin/uv pip compile --quiet --no-deps --no-header --no-annotate --extra s3 --extra onnx --extra report pyproject.toml) \
 && python -c 'import site; print("/opt/vaedist", file=open(site.getsitepackages()[0] + "/vaedist.pth", "w"))'

# Clusters run it as users of their own, whom this system does not know and who may write here only.
ENV HOME=/home/vaedist USER=vaedist PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN mkdir --mode=1777 /home/vaedist data runs

ARG COMMIT=
LABEL org.opencontainers.image.revision=$COMMIT
COPY . .
RUN chmod -R a+rX . && if [ -n "$COMMIT" ]; then echo "$COMMIT" > COMMIT; fi
USER 1000:1000

HEALTHCHECK --interval=1m --timeout=30s CMD ["python", "-m", "vaedist.health"]
# A stop is for the trainer to hear, and for the launcher of a single one to outlive: it would end at once, and with it
# the container, before anything is saved.
ENTRYPOINT ["tini", "-s", "-g", "--", "env", "--ignore-signal=INT,TERM,USR1,USR2", "accelerate", "launch"]
CMD ["--help"]
