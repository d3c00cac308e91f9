# The same on Ascend NPUs. CANN's image is given: --build-arg BASE=quay.io/ascend/cann:TAG, whose
# TAG names CANN's version, the part (910b, a3, 310p) and Python 3.11. torch is the CPU wheel there.
ARG BASE

FROM ${BASE} AS dependencies
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY pyproject.toml constraints.txt docker/dependencies.py ./
RUN python3 -m venv /opt/pangu \
    && python3 dependencies.py npu serve compress > requirements.txt \
    && /opt/pangu/bin/pip install --extra-index-url "${TORCH_INDEX}" -c constraints.txt -r requirements.txt

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
USER 0
COPY --from=dependencies /opt/pangu /opt/pangu
COPY --from=wheel /source/dist /opt/dist
COPY docker/entrypoint.sh docker/health.py /opt/
RUN /opt/pangu/bin/pip install --no-cache-dir --no-deps /opt/dist/*.whl \
    && useradd --create-home --uid 1000 pangu \
    && mkdir -p /work/runs /work/data \
    && chown -R pangu /work
ENV PATH=/opt/pangu/bin:${PATH} \
    HCCL_CONNECT_TIMEOUT=1200 \
    HCCL_WHITELIST_DISABLE=1 \
    TASK_QUEUE_ENABLE=2 \
    CPU_AFFINITY_CONF=1 \
    PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
USER 1000
WORKDIR /work
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s CMD ["python", "/opt/health.py"]
ENTRYPOINT ["/opt/entrypoint.sh"]
CMD ["doctor"]
