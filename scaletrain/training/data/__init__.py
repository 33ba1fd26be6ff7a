"""One file a data set: ``data(*, <options>) -> (train, test)``.

Both are map-style ``torch.utils.data.Dataset``s of (input, target).
"""
