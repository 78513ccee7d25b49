"""Kinds of tasks, one file each: what models they take, what is learned, and how a model is measured.

A new kind is a class in a file of its own, derived from [`Kind`][dynalora.evaluation.kinds.base.Kind] where its tasks
are only measured, or from [`LearnedKind`][dynalora.evaluation.kinds.base.LearnedKind] where they are trained on, too;
an entry of [`benchmarks`][dynalora.evaluation.benchmarks] names it. Nothing else knows which kinds there are.
"""
