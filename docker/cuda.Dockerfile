# The same on NVIDIA's GPUs. torch's own wheels bring CUDA; the host brings the driver and NVIDIA's
# container toolkit.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY pyproject.toml constraints.txt docker/dependencies.py ./
RUN python3 -m venv /opt/pangu \
    && python3 dependencies.py serve compress cuda > requirements.txt \
    && /opt/pangu/bin/pip install -c constraints.txt -r requirements.txt

FROM ${BASE} AS wheel
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY constraints.txt setup.py pyproject.toml README.md LICENSE ./
COPY configs configs
COPY launch launch
COPY pangu pangu
COPY simulator simulator
RUN python3 -m venv /opt/build \
    && PIP_CONSTRAINT=constraints.txt /opt/build/bin/pip wheel --no-deps --wheel-dir dist .

FROM ${BASE}
# Triton compiles its launchers with the system's compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=dependencies /opt/pangu /opt/pangu
COPY --from=wheel /source/dist /opt/dist
COPY docker/entrypoint.sh docker/health.py /opt/
RUN /opt/pangu/bin/pip install --no-cache-dir --no-deps /opt/dist/*.whl \
    && useradd --create-home --uid 1000 pangu \
    && mkdir -p /work/runs /work/data \
    && chown -R pangu /work
ENV PATH=/opt/pangu/bin:${PATH} \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /work
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s CMD ["python", "/opt/health.py"]
ENTRYPOINT ["/opt/entrypoint.sh"]
CMD ["doctor"]
