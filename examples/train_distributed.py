"""Distributed training of a small CNN on scikit-learn's handwritten digits: DDP, or FSDP2 with ``--fsdp``.

pip install "fusednn[demo]"
torchrun --nproc-per-node 2 examples/train_distributed.py
torchrun --nproc-per-node 2 examples/train_distributed.py --fsdp
torchrun --nproc-per-node 2 examples/train_distributed.py --stock     # the same without fusednn
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fusednn


def build_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.PReLU(),
        nn.Linear(64, 10),
    )


def load_data() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fsdp", action="store_true", help="shard parameters, gradients and optimizer state (FSDP2)")
    parser.add_argument("--stock", action="store_true", help="PyTorch's own layers, loss and optimizer")
    parser.add_argument("--sync-batch-norm", action="store_true", help="batch norm over the batches of all processes")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    train(device, arguments)
    dist.destroy_process_group()


def train(device: str, arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)  # the same weights everywhere
    model = build_model().to(device)
    loss_function = nn.CrossEntropyLoss()
    if not arguments.stock:
        fusednn.replace_layers(model)  # before parameters are wrapped or sharded
        fusednn.replace_layers(loss_function)
    if arguments.sync_batch_norm:
        converter = nn.SyncBatchNorm if arguments.stock else fusednn.layers.SyncBatchNorm
        model = converter.convert_sync_batchnorm(model)
    if arguments.fsdp:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    if not arguments.stock:
        fusednn.optim.replace(optimizer)

    data = load_data()
    sampler = DistributedSampler(data, seed=0, drop_last=True)
    loader = DataLoader(data, arguments.batch_size, sampler=sampler, drop_last=True)
    for step in range(arguments.steps):
        if step % len(loader) == 0:
            sampler.set_epoch(step // len(loader))
            batches = iter(loader)
        images, labels = (tensor.to(device) for tensor in next(batches))
        loss = loss_function(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {mean.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
