"""Which stages make a policy, and what is compared.

Modules:
    recipes: sequences of stages: the shipped models, and the recipes that are compared.
    release: a model to the place that the package ships it from.
    few_shot: few-shot adaptation and continual learning.
    robots: a policy for each kind of robot, beside its controls.
    dagger: DAgger: the expert labels the policy's own rollouts.
"""
