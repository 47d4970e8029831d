# The server on a CPU, as another user than root. For GPUs see docs/serving.md.
#
#   docker build -t conceptmaster .
#   docker run --rm -p 127.0.0.1:8000:8000 -v conceptmaster:/data conceptmaster --no-auth
FROM python:3.12-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
# What pip installs besides the runtime: "serve" on a CPU. For a node of a Ray cluster with GPUs (docs/cluster.md)
# --build-arg EXTRAS=serve,ray,gpu, and for KubeRay, which asks Ray whether it lives, --build-arg ALSO='ray[default]'.
ARG EXTRAS=serve
ARG ALSO=
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[${EXTRAS}]" ${ALSO} \
    && rm -r /wheels \
    && useradd --uid 10001 --create-home conceptmaster \
    && install -d -o conceptmaster /data
USER 10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
# Port 8000 of the container is what others reach, so it needs --api-key-file FILE, or --no-auth said aloud.
ENTRYPOINT ["conceptmaster", "serve", "--host", "0.0.0.0", "--data", "/data"]
