"""The page of `python -m msn_jax.report`: the files of runs become sections of tables, plots and answers."""
