"""Training stages: their data, cached features, trainer, launch, search, and what a step costs."""
