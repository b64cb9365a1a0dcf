import argparse

import torch
from torch import nn


class Net(nn.Module):
    """A backbone and a head."""

    def __init__(self, classes=4):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.fc = nn.Linear(16, classes)

    def forward(self, inputs):
        return self.fc(self.backbone(inputs))


training = nn.DataParallel(Net())
optimizer = torch.optim.AdamW(training.parameters())
training.module(torch.randn(8, 8)).sum().backward()
optimizer.step()
checkpoint = {
    "state_dict": training.state_dict(),
    "optimizer": optimizer.state_dict(),
    "epoch": 37,
    "args": argparse.Namespace(lr=1e-3),
}
torch.save(checkpoint, "model.pth")
model = Net().eval()
