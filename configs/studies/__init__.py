"""Studies by name: one module a study, each with a function `study(options)` that returns a
`train.study.definition.Study`. `python -m train.study --list` shows them."""
