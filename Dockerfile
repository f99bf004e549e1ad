# For a CPU:         docker build -t nanogpt_lit .
# For NVIDIA GPUs:   docker build -t nanogpt_lit --build-arg TORCH=https://download.pytorch.org/whl/cu130 .
#
#   docker run --rm -v "$PWD:/work" nanogpt_lit fit --config quickstart
#   docker run --rm --gpus all -v "$PWD:/work" nanogpt_lit fit --config rtx2050 --data.source my_texts
FROM python:3.12-slim

ARG TORCH=https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/
RUN pip install --no-cache-dir -c /tmp/constraints.txt torch --index-url "$TORCH"

COPY pyproject.toml README.md LICENSE /src/
COPY nanogpt_lit /src/nanogpt_lit
COPY configs /src/configs
RUN pip install --no-cache-dir -c /tmp/constraints.txt "/src[bpe,gguf,nvidia,parquet,plot]" && rm -r /src

# Runs and shards go where the current folder is mounted, as a user without rights elsewhere.
RUN useradd --create-home --uid 1000 trainer && mkdir /work && chown trainer /work
USER trainer
WORKDIR /work
ENTRYPOINT ["nanogpt-lit"]
CMD ["--help"]
