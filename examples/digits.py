"""An ordinary PyTorch training script, plus two lines: a small CNN learns scikit-learn's handwritten digits.

pip install "fusednn[demo]"
python examples/digits.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusednn


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Images (N, 1, 8, 8) scaled to [0, 1], and their labels: to train on, and to test on."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    train, test, train_labels, test_labels = train_test_split(
        images, torch.tensor(labels), test_size=360, random_state=0
    )
    return TensorDataset(train, train_labels), TensorDataset(test, test_labels)


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.PReLU(32),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.PReLU(64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((model(images).argmax(1) == labels).float().mean())


def main(epochs: int = 10) -> float:
    """Train, print what happens, and return the accuracy on the test images."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = load_data()
    model = build_model().to(device)

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loss_function = nn.CrossEntropyLoss()

    fusednn.replace_layers(model)  # this is all
    fusednn.replace_layers(loss_function)

    test_images, test_labels = (tensor.to(device) for tensor in test.tensors)
    score = 0.0
    for epoch in range(1, epochs + 1):
        model.train()
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            loss = loss_function(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        score = accuracy(model, test_images, test_labels)
        print(f"epoch {epoch}: loss of the last batch {loss.item():.4f}, test accuracy {score:.1%}")

    print(fusednn.explain(model, test_images))  # which layers took a kernel, and why the others didn't
    return score


if __name__ == "__main__":
    main()
