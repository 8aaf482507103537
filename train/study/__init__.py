"""Studies: many runs that answer one question. `python -m train.study NAME`; definitions are
modules in configs/studies/."""
