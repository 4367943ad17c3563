"""The story made fast, restartable and shared: each file says which plain function it equals."""
