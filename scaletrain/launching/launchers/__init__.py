"""One file a launcher: a pure function ``plan(job, *, <options>) -> LaunchPlan``.

They import no torch.
"""
