"""Recipes: which stages make a policy, few-shot adaptation, continual learning, DAgger."""
