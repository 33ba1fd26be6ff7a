"""One file a launcher: a pure function ``plan(job, *, <options>) -> LaunchPlan``. No torch here."""
