# Shardstream on NVIDIA's PyTorch container. Checked with hadolint; not built or run by the project.
#
#   docker build --tag shardstream .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data -v "$PWD/runs:/shardstream/runs" \
#     shardstream python train.py --config recipes/base.yaml data.root=/data/imagenet-shards
#
# The container brings PyTorch and torchvision of its own: constraints.txt, which pins others, is not
# used here, and the container's own constraints (PIP_CONSTRAINT) keep pip from replacing them.
FROM nvcr.io/nvidia/pytorch:25.05-py3

# The headers of libjpeg-turbo, without which images are decoded by Pillow alone. They are the
# distribution's own version.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends libjpeg-turbo8-dev && \
    rm -rf /var/lib/apt/lists/*

WORKDIR /shardstream
COPY . .
RUN pip install --no-cache-dir --editable '.[gpu,plots,s3,tensorboard,wandb]' && \
    python -c 'from loaders.decode import decoder_name; print(decoder_name("region"))'

CMD ["python", "train.py", "--help"]
