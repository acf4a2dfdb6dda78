# docker build -t diffalign .                                      a CPU's torch
# docker build --build-arg WHEELS=cu130 -t diffalign:cuda .        CUDA's: its libraries come with torch, the driver from the host
# docker run --rm -v "$PWD:/work" diffalign train flow_grpo/shapes-sd3
# docker run --rm --gpus all -v "$PWD:/work" -v "$HOME/.cache/huggingface:/cache" diffalign:cuda doctor --card
#
# Linted by a test; not built there, and not by us yet.
FROM python:3.12-slim-bookworm

ARG WHEELS=cpu
ARG EXTRAS=rewards,video,server,quantize,trackers
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HOME=/cache

# torch before all else, from the index of its kind; what comes after takes what is there.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch torchvision --index-url "https://download.pytorch.org/whl/${WHEELS}"

COPY pyproject.toml README.md LICENSE /source/
COPY diffalign /source/diffalign
COPY reward_models /source/reward_models
COPY configs /source/configs
RUN pip install --no-cache-dir "/source[${EXTRAS}]" && rm -rf /source

# Runs, pictures and the hub's cache belong to whoever starts it: docker run --user "$(id -u):$(id -g)"
RUN useradd --create-home --uid 1000 person && mkdir -p /work /cache && chmod 0777 /work /cache
USER 1000
WORKDIR /work
ENTRYPOINT ["diffalign"]
CMD ["--help"]
