"""One file a data set: ``data(*, <options>) -> (train, test)``, two map-style ``torch.utils.data.Dataset``s of (input, target)."""
