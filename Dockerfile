# docker build -t codex-nb .                                    for the CPU
# docker build -t codex-nb --build-arg TORCH_BACKEND=cu130 .    for NVIDIA GPUs
# (run it with --gpus all; cu126 for GPUs before Turing, such as V100)
FROM python:3.11-slim-bookworm AS build
ARG TORCH_BACKEND=cpu
WORKDIR /src
COPY docker/requirements.lock docker/install.sh docker/
COPY tools/lock.py tools/
RUN TORCH_BACKEND=${TORCH_BACKEND} docker/install.sh /opt/codex-nb
COPY pyproject.toml README.md LICENSE ./
COPY codex_nb codex_nb
COPY data data
COPY nbs nbs
COPY docker/package.sh docker/lab.sh docker/
RUN docker/package.sh /opt/codex-nb && cp docker/lab.sh /opt/codex-nb/bin/codex-nb-lab

FROM python:3.11-slim-bookworm
ARG UID=1000
RUN useradd --uid ${UID} --create-home codex && install -d -o codex -g codex /workspace
COPY --from=build /opt/codex-nb /opt/codex-nb
ENV PATH=/opt/codex-nb/bin:$PATH \
    CODEX_NB_HOME=/workspace \
    CODEX_NB_MODELS=/workspace/models \
    PYTHONDONTWRITEBYTECODE=1
USER ${UID}
WORKDIR /workspace
VOLUME /workspace
HEALTHCHECK --interval=60s --timeout=30s --start-period=10s CMD ["codex-nb", "doctor", "--quick"]
ENTRYPOINT ["codex-nb"]
CMD ["--help"]
