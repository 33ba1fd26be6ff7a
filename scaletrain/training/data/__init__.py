"""One file a data set: ``data(*, <options>) -> (train, test)``, or a ``scaletrain.Data``.

Each of the two is a ``torch.utils.data.Dataset`` of (input, target), or a stream of them.
"""

import numpy as np
from torch.utils.data import Dataset, Subset

from scaletrain.errors import UserError
from scaletrain.training.permutation import Permutation


def held_out(dataset: Dataset, length: int, share: float) -> tuple[Dataset, Dataset]:
    """Return (train, test): a share of the samples is for testing, the same in every run.

    Raises:
        UserError: nothing would be left for one of the two.
    """
    num_test = round(length * share)
    if not 0 < num_test < length:
        raise UserError(
            f"data.test_share: {share:g} of {length} samples leaves none to"
            f" {'test' if num_test == 0 else 'train'} with"
        )
    order = Permutation(length, "test set")(np.arange(length))
    # In the order of the files, which reads faster; the order of training is drawn anyway.
    test, train = np.sort(order[:num_test]), np.sort(order[num_test:])
    return Subset(dataset, train.tolist()), Subset(dataset, test.tolist())
