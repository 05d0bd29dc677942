# Sotto in a container: not root, models and results in volumes, one image for GPU and processor.
#
#   docker build -t sotto .                            with CUDA libraries (about 8 GB)
#   docker build -t sotto --build-arg BUILD=cpu .      processor only (about 2 GB)
#   docker run -p 7860:7860 -v sotto-models:/models -v sotto-data:/data --gpus all sotto
#   docker run -v "$PWD":/recordings sotto transcribe /recordings/talk.mp3
#
# The CUDA libraries come with PyTorch's packages, so no CUDA base image is needed; the host gives driver and GPU through
# the NVIDIA Container Toolkit.
FROM python:3.12.12-slim-bookworm

# cpu, or default: the build with CUDA on x86-64
ARG BUILD=default

# Triton compiles the launchers of our GPU kernels with a C compiler; Python's headers are in the base image.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ffmpeg $([ "$BUILD" = cpu ] || echo gcc libc6-dev) \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 sotto \
    && install -d -o sotto -g sotto /models /data

WORKDIR /app

# Packages before the source: a change of the source does not install them again.
COPY start.sh requirements.txt ./
RUN PIP_NO_CACHE_DIR=1 bash -c 'source ./start.sh && install_packages "$BUILD"'

COPY . .

# Inside a container 127.0.0.1 would be reachable by nobody; which address the host opens is said with -p.
ENV SOTTO_SERVER_NAME=0.0.0.0 \
    SOTTO_SERVER_PORT=7860 \
    SOTTO_CACHE_DIR=/models \
    SOTTO_WORK_DIR=/data \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1

USER sotto
VOLUME ["/models", "/data"]
EXPOSE 7860

# 200 as soon as the page is served; a proxy in the environment plays no part, and its own certificate is not judged.
HEALTHCHECK --interval=30s --timeout=6s --start-period=3m --retries=3 CMD ["/app/.venv/bin/python", "-c", \
    "import http.client as http, os, ssl, sys; \
    place = ('127.0.0.1', int(os.environ['SOTTO_SERVER_PORT'])); \
    secure = {'context': ssl._create_unverified_context()} if os.environ.get('SOTTO_SSL_CERTFILE') else None; \
    link = http.HTTPSConnection(*place, timeout=5, **secure) if secure else http.HTTPConnection(*place, timeout=5); \
    link.request('GET', '/health'); \
    sys.exit(link.getresponse().status != 200)"]

ENTRYPOINT ["/app/.venv/bin/python", "/app/app.py"]
