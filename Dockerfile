# The image of cluster.yaml and docs/kuberay-rayjob.yaml: Ray's own GPU image of the tested version, with this package.
#
#   docker build -t registry.example.com/shardedit:0.1.0 . && docker push registry.example.com/shardedit:0.1.0
#
# Then put that name where docker.image stands in cluster.yaml, or image in the RayJob. Weights do not belong in it: nodes
# mount them. Ray brings its own start commands, so there is none here.
#
# Checked offline by tests/test_cluster_yaml.py; never built there.
FROM rayproject/ray:2.60.0-py311-gpu

# Which build of torch: one whose CUDA the driver of the nodes serves (https://pytorch.org/get-started/locally/).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu126

WORKDIR /home/ray/shardedit
COPY --chown=ray:users constraints.txt ./
# By itself and first: the largest layer, and the one that changes least.
RUN pip install --no-cache-dir --index-url ${TORCH_INDEX} "$(grep '^torch==' constraints.txt)" \
    && python -c "import torch; assert torch.version.cuda, f'{torch.__version__} is a build for CPUs'"

COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users configs/ configs/
COPY --chown=ray:users jobs/ jobs/
COPY --chown=ray:users pipeline/ pipeline/
RUN pip install --no-cache-dir -c constraints.txt ".[cluster]" && shardedit --version

WORKDIR /home/ray
