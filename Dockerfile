# Image for one machine with GPUs, and for KubeRay (deploy/kuberay). Needs the NVIDIA driver 580 or newer and the NVIDIA container
# toolkit on the host; CUDA's libraries come with the packages. Weights are not in the image: see docs/cluster.md.
#     docker build -t vidgen-ray .
#     docker run --rm --gpus all --shm-size 16g vidgen-ray doctor -p gpu-80gb
FROM python:3.12-slim-bookworm

# libgl1 and libglib2.0-0: OpenCV. gcc and libc6-dev: Triton, for torch.compile. wget: the probes of KubeRay. tini: forwards SIGTERM and reaps Ray's processes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libgl1 libglib2.0-0 tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash vidgen \
    && install -d -o vidgen -g vidgen /data /weights /home/vidgen/.insightface

WORKDIR /opt/vidgen-ray
COPY pyproject.toml README.md LICENSE ./
COPY deploy/constraints.txt deploy/constraints.txt
COPY examples examples
COPY vidgen_ray vidgen_ray
RUN pip install --no-cache-dir --constraint deploy/constraints.txt ".[postgres,quantization,dataset]" \
    && python -c "import torch; from onnxruntime.capi import build_and_package_info as ort; \
pair = torch.version.cuda, ort.cuda_version; print('CUDA of torch and onnxruntime-gpu:', pair); \
assert pair[0] and pair[0].split('.')[0] == pair[1].split('.')[0], pair"

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HOME=/weights/huggingface \
    HF_HUB_OFFLINE=1 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=vidgen_ray.online:middlewares \
    PYTHONUNBUFFERED=1

# A number: Kubernetes cannot tell whether a name is root.
USER 1000
WORKDIR /data
VOLUME ["/data", "/weights"]
EXPOSE 8000

# Only `vidgen serve` listens. Other commands count as healthy while they run.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m --retries=3 \
    CMD grep -qz '^serve$' /proc/1/cmdline || exit 0; wget -q -O /dev/null http://127.0.0.1:8000/healthz

ENTRYPOINT ["tini", "--", "vidgen"]
CMD ["serve", "--host", "0.0.0.0", "--data", "/data", "--keys", "/etc/vidgen/keys.yaml"]
