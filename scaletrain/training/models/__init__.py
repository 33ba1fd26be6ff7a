"""One file a model: ``model(*, <options>) -> torch.nn.Module``."""
