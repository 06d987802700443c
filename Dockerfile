# One peer on CPUs, with nothing to install but Docker:
#   docker build -t p2p-llm-forge .
#   docker run --rm -v "$PWD:/data" p2p-llm-forge --dataset-path corpus.txt --output-dir artifacts/x --minutes 10
# Several machines: add --network host, and the flags of a launch by hand (--rank, --world-size, ...).
FROM python:3.12-slim
WORKDIR /app
# The PyTorch for CPUs; the usual one brings gigabytes for GPUs.
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu
COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[pictures]" && rm -rf build
# What a run reads and writes lies in the folder that is mounted at /data, and is its owner's.
WORKDIR /data
ENV HF_HOME=/data/.huggingface
ENTRYPOINT ["p2p-llm-forge"]
CMD ["--help"]
