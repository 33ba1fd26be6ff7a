"""The digits data set, 2 ms a training sample."""

import time

from torch.utils.data import Dataset

from scaletrain.training.data import digits


class Slow(Dataset):
    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        time.sleep(0.002)
        return self.inner[index]


def data():
    train, test = digits.data()
    return Slow(train), test
